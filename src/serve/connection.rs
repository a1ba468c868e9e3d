//! One connection: what it may take, and how it ends.
//!
//! Hyper knows one limit, from the end of a response to the end of the next head.
//! That has to be long, since a connection may stay idle, so what is shorter is kept
//! here, around the socket: the time for a head from its first byte on (the first one
//! from the connection on), and the time in which a client has to take its response.

use std::{
    future::poll_fn,
    io::{self, ErrorKind, IoSlice},
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{Router, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tower_service::Service;
use tracing::debug;

use crate::http::caller::Peer;

/// Most bytes of a head, the request line included; more get 431. A key in a
/// header is 255 bytes long.
const HEAD_MAX: usize = 32 * 1024;

/// Most bytes that are read before somebody has taken those before them.
const BUFFER_MAX: usize = 64 * 1024;

/// How fast a response has to be taken, in bytes per second, after the time in which
/// a client may take nothing.
const RATE_MIN: u64 = 64 * 1024;

/// How long a response may take to be sent after the service was told to stop.
const LAST_DELIVERY: Duration = Duration::from_secs(2);

/// How long a connection may take for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// For a head, from its first byte on; for the first one, from the connection on.
    pub(super) head: Duration,
    /// Between a response and the end of the next head.
    pub(super) idle: Duration,
    /// For a client to take nothing of a response.
    pub(super) stall: Duration,
    /// Whether there may be a second request.
    pub(super) keep_alive: bool,
}

/// What a connection is doing, as the service and the socket tell it to each other.
/// All of them are polled by one task.
#[derive(Debug, Default)]
struct Activity {
    heads: AtomicU64,
    working: AtomicBool,
    sending: AtomicBool,
}

/// Sets a request to be worked on, until it is dropped.
struct Work(Arc<Activity>);

impl Work {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.heads.fetch_add(1, Ordering::Relaxed);
        activity.working.store(true, Ordering::Relaxed);
        Self(Arc::clone(activity))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.working.store(false, Ordering::Relaxed);
    }
}

/// Serves a connection until it ends. Once `closing` is true it ends when the request
/// that is being worked on is answered, and at once if there is none.
pub(super) async fn serve(
    stream: TcpStream,
    address: IpAddr,
    router: Router,
    timeouts: Timeouts,
    mut closing: watch::Receiver<bool>,
) {
    let activity = Arc::new(Activity::default());
    let service = service_fn({
        let activity = Arc::clone(&activity);
        move |mut request: Request<Incoming>| {
            let work = Work::begin(&activity);
            request.extensions_mut().insert(Peer(address));
            let response = router.clone().call(request);
            async move {
                let response = response.await;
                drop(work);
                response
            }
        }
    });
    let stream = TimedStream::new(stream, timeouts, Arc::clone(&activity));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.idle)
        .max_header_size(HEAD_MAX)
        .max_buf_size(BUFFER_MAX)
        .keep_alive(timeouts.keep_alive)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = |end: hyper::Result<()>| {
        if let Err(error) = end {
            debug!(%error, "a connection broke");
        }
    };
    tokio::select! {
        biased;
        end = connection.as_mut() => return ended(end),
        _ = closing.wait_for(|closing| *closing) => {}
    }
    connection.as_mut().graceful_shutdown();
    let mut delivery: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        // First, since a request may have arrived.
        if let Poll::Ready(end) = connection.as_mut().poll(cx) {
            ended(end);
            return Poll::Ready(());
        }
        if activity.working.load(Ordering::Relaxed) {
            delivery = None;
            return Poll::Pending;
        }
        if !activity.sending.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        let delivery = delivery.get_or_insert_with(|| Box::pin(sleep(LAST_DELIVERY)));
        delivery.as_mut().poll(cx)
    })
    .await;
}

/// A socket whose client has to send its heads, and take its responses, in time.
struct TimedStream<S> {
    stream: S,
    timeouts: Timeouts,
    activity: Arc<Activity>,
    /// The end of the time for a head, and how many heads there were before it.
    head: Option<(u64, Pin<Box<Sleep>>)>,
    response: Option<Sending>,
}

/// A response that the client did not take at once.
struct Sending {
    began: Instant,
    progressed: Instant,
    sent: u64,
    timer: Pin<Box<Sleep>>,
}

/// A socket that can be closed without what was not sent.
trait Abort {
    fn abort_on_close(&self);
}

impl Abort for TcpStream {
    fn abort_on_close(&self) {
        // Or the kernel would keep it for minutes. If it cannot be set, it does.
        let _ = self.set_zero_linger();
    }
}

impl<S: Abort> TimedStream<S> {
    fn new(stream: S, timeouts: Timeouts, activity: Arc<Activity>) -> Self {
        let timer = Box::pin(sleep(timeouts.head));
        Self {
            stream,
            timeouts,
            activity,
            head: Some((0, timer)),
            response: None,
        }
    }

    fn heads(&self) -> u64 {
        self.activity.heads.load(Ordering::Relaxed)
    }

    /// What becomes of a write: an error if it is too late for it.
    fn write_result(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(Ok(written)) => {
                if let Some(sending) = &mut self.response {
                    sending.sent += written as u64;
                    sending.progressed = Instant::now();
                }
                Poll::Ready(Ok(written))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                self.activity.sending.store(true, Ordering::Relaxed);
                let now = Instant::now();
                let sending = self.response.get_or_insert_with(|| Sending {
                    began: now,
                    progressed: now,
                    sent: 0,
                    timer: Box::pin(sleep_until(now)),
                });
                let earned = Duration::from_secs(sending.sent / RATE_MIN);
                let end = sending.progressed.min(sending.began + earned) + self.timeouts.stall;
                sending.timer.as_mut().reset(end);
                ready!(sending.timer.as_mut().poll(cx));
                self.stream.abort_on_close();
                Poll::Ready(Err(ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl<S: AsyncRead + Abort + Unpin> AsyncRead for TimedStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let heads = this.heads();
        if this
            .head
            .as_ref()
            .is_some_and(|(before, _)| *before != heads)
        {
            this.head = None;
        }
        let filled = buffer.filled().len();
        match Pin::new(&mut this.stream).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => {
                let is_head = !this.activity.working.load(Ordering::Relaxed);
                if is_head && buffer.filled().len() > filled && this.head.is_none() {
                    this.head = Some((heads, Box::pin(sleep(this.timeouts.head))));
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                let Some((_, timer)) = &mut this.head else {
                    return Poll::Pending;
                };
                ready!(timer.as_mut().poll(cx));
                Poll::Ready(Err(ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl<S: AsyncWrite + Abort + Unpin> AsyncWrite for TimedStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.write_result(cx, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, slices);
        this.write_result(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
        // Hyper flushes when it has nothing left to write.
        this.response = None;
        this.activity.sending.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::timeout,
    };

    use super::*;

    impl Abort for DuplexStream {
        fn abort_on_close(&self) {}
    }

    const TIMEOUTS: Timeouts = Timeouts {
        head: Duration::from_secs(10),
        idle: Duration::from_secs(75),
        stall: Duration::from_secs(10),
        keep_alive: true,
    };

    /// Of a client that takes `bytes` every `pause`: how long a response of 12 MiB is
    /// sent until it has all of it, or nothing more is sent.
    async fn sending(bytes: usize, pause: Duration) -> (Duration, io::Result<()>) {
        let (server, mut client) = duplex(4096);
        let mut server = TimedStream::new(server, TIMEOUTS, Arc::default());
        tokio::spawn(async move {
            let mut buffer = vec![0; bytes];
            while client.read_exact(&mut buffer).await.is_ok() {
                sleep(pause).await;
            }
            // Stays connected.
            std::future::pending::<()>().await;
        });
        let began = Instant::now();
        let response = vec![0; 12 << 20];
        let result = async {
            server.write_all(&response).await?;
            server.flush().await
        };
        let result = timeout(Duration::from_hours(1), result).await.unwrap();
        (began.elapsed(), result)
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_is_taken_in_time_or_given_up() {
        // Nothing at all, after the first 4 kB.
        let (took, result) = sending(4096, Duration::from_hours(1)).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(took.as_secs(), 10);
        // A little, again and again.
        let (took, result) = sending(1460, Duration::from_secs(9)).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(took.as_secs() <= 19, "{took:?}");
        // Slowly, but fast enough.
        let (took, result) = sending(4096, Duration::from_millis(50)).await;
        result.unwrap();
        assert!(took.as_secs() > 100, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_less_time_than_an_idle_connection() {
        let (server, mut client) = duplex(4096);
        let activity = Arc::<Activity>::default();
        let mut server = TimedStream::new(server, TIMEOUTS, Arc::clone(&activity));
        let mut buffer = [0; 64];
        let head = b"GET / HTTP/1.1\r\n\r\n";
        client.write_all(head).await.unwrap();
        server.read_exact(&mut buffer[..head.len()]).await.unwrap();
        drop(Work::begin(&activity));
        // Idle: here there is no limit.
        let idle = timeout(Duration::from_hours(1), server.read(&mut buffer));
        assert!(idle.await.is_err());
        // A head that was begun has to be ended.
        client.write_all(b"G").await.unwrap();
        server.read_u8().await.unwrap();
        let began = Instant::now();
        let trickle = tokio::spawn(async move {
            while client.write_all(b"E").await.is_ok() {
                sleep(Duration::from_millis(700)).await;
            }
        });
        let fails = async {
            loop {
                if let Err(error) = server.read(&mut buffer).await {
                    return error;
                }
            }
        };
        let error = timeout(Duration::from_hours(1), fails).await.unwrap();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!((10..=11).contains(&began.elapsed().as_secs()));
        drop(server);
        trickle.await.unwrap();
    }
}
