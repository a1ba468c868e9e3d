//! `payonce serve`: starts the parts, and ends them in order.

mod connection;

use std::{
    future::{pending, ready},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    http::{HeaderValue, header::CONNECTION},
    middleware::map_response,
    response::Response,
    serve::Listener,
};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use crate::{
    accounts,
    cli::Failure,
    config,
    db::{self, ErrorClass, PreflightError, READ_TIMEOUT, Server},
    http::{
        self, App,
        admission::Admission,
        caller::{self, Callers},
        limit::Limits,
    },
    idempotency::{held::HeldKeys, purge},
    reader::Reader,
    writer::{self, Writer},
};
use connection::Timeouts;

/// Says when everything has to be finished, once the service is asked to stop.
type Stopping = watch::Receiver<Option<Instant>>;

/// How long a database that is not there yet is waited for at the start.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may take for what. Idle ones stay for longer than the 60 s
/// after which load balancers commonly close theirs, so that they never send a request
/// on one that is being closed here.
const TIMEOUTS: Timeouts = Timeouts {
    head: Duration::from_secs(10),
    idle: Duration::from_secs(75),
    stall: Duration::from_secs(10),
    keep_alive: true,
};

/// The same for a connection that there is no place for: it gets one answer.
const REFUSED: Timeouts = Timeouts {
    head: Duration::from_secs(1),
    idle: Duration::from_secs(1),
    stall: Duration::from_secs(1),
    keep_alive: false,
};

/// How many of those there may be at once.
const REFUSED_AT_ONCE: usize = 128;

/// How many files are left to what is no connection of a client and none of the pool:
/// the writer, the reader, look-ups of API keys, the listener, the runtime. Those are
/// about 20.
const FILES_OF_OTHERS: u64 = 64;

/// How long idle connections stay open after SIGTERM. Hyper closes them at once,
/// also those on which a request has just arrived that nobody has read yet.
const LAST_CALL: Duration = Duration::from_millis(250);

/// Runs until SIGTERM or SIGINT, and then until what was taken is done.
///
/// # Errors
/// What keeps the service from starting, or that it was cut off at the end.
pub async fn run(config: config::Serve) -> Result<(), Failure> {
    let rules = config.rules.rules()?;
    let options = config.database.connect_options()?;
    let server = if config.transaction_pooler {
        Server::behind_pooler(options)
    } else {
        Server::direct(options)
    };
    wait_until_fit(&server).await?;

    let pool = server.pool(config.pool_size);
    let callers = Callers::new(
        server.pool(caller::CONNECTIONS),
        caller::Options {
            failures_max: config.auth_failure_limit,
            ..caller::Options::default()
        },
    );
    let reader = Reader::start(&server);
    let writer = Writer::start(writer::Options {
        server,
        batch_max: config.batch_max.into(),
        queue_max: config.queue_max,
    });
    let limits = Limits::per_second(config.rate_limit);
    let purge = tokio::spawn(purge::run_forever(pool.clone(), config.purge_interval));
    let app = App {
        callers,
        admission: Admission::new(config.pool_size),
        held_keys: HeldKeys::default(),
        pool: pool.clone(),
        reader,
        writer: writer.clone(),
        wait: config.duplicate_wait,
        rules,
        limits: limits.clone(),
        keyless: config.keyless,
        duplicate_guard: config.duplicate_guard,
        duplicate_guard_window: config.duplicate_guard_window,
    };

    let listener = TcpListener::bind(&config.listen_addr)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", config.listen_addr))?;
    let address = listener.local_addr()?;
    let forget = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_mins(1));
        loop {
            ticks.tick().await;
            limits.evict_idle();
        }
    });
    let (stop, stopping) = watch::channel(None);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: finishing what was taken");
        let _ = stop.send(Some(Instant::now() + config.shutdown_timeout));
    });
    info!(%address, "listening");
    // Whoever starts it for the first time would be at a loss here.
    if let Ok(false) = db::within(READ_TIMEOUT, accounts::exist(&pool)).await {
        info!("there is no account yet: `payonce account create NAME` makes one, and its API key");
    }

    // First the connections, then the writer, since the connections wait for it.
    let connections = serve(
        listener,
        http::router(app),
        connections_max(config.connections_max, config.pool_size),
        TIMEOUTS,
        stopping.clone(),
    );
    let late = tokio::select! {
        () = connections => false,
        () = deadline(stopping.clone()) => true,
    };
    purge.abort();
    forget.abort();
    let left = stopping.borrow().map_or(Duration::ZERO, |end| {
        end.saturating_duration_since(Instant::now())
    });
    let finished = writer.shut_down(left).await;
    pool.close().await;
    if late || !finished {
        return Err(
            "stopped at the deadline with requests unfinished; their retries find what was done"
                .into(),
        );
    }
    info!("stopped");
    Ok(())
}

/// Serves connections until it is told to stop, and then all that were made by
/// then until their requests are answered.
async fn serve(
    mut listener: TcpListener,
    router: Router,
    connections_max: usize,
    timeouts: Timeouts,
    mut stopping: Stopping,
) {
    let asked_to_stop = stopping.clone();
    let router = router.layer(map_response(move |mut response: Response| {
        if asked_to_stop.borrow().is_some() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        ready(response)
    }));
    let places = Arc::new(Semaphore::new(connections_max));
    // Beyond those, some are told that there is no place, and the rest wait in the
    // queue of the listener.
    let sockets = Arc::new(Semaphore::new(connections_max + REFUSED_AT_ONCE));
    let refusing = http::refusing_router();
    let (close, closing) = watch::channel(false);
    loop {
        // What was connected before the stop is in the queue of the listener.
        let accepted = async {
            let socket = Arc::clone(&sockets).acquire_owned().await;
            (socket, Listener::accept(&mut listener).await)
        };
        let (socket, (stream, peer)) = tokio::select! {
            biased;
            accepted = accepted => accepted,
            _ = stopping.wait_for(Option::is_some) => break,
        };
        // An answer is one small packet, and must not wait for another.
        if let Err(error) = stream.set_nodelay(true) {
            warn!(%error, "TCP_NODELAY was refused");
        }
        let place = Arc::clone(&places).try_acquire_owned();
        let (router, timeouts) = if place.is_ok() {
            (router.clone(), timeouts)
        } else {
            (refusing.clone(), REFUSED)
        };
        let connection = connection::serve(stream, peer.ip(), router, timeouts, closing.clone());
        tokio::spawn(async move {
            connection.await;
            drop((place, socket));
        });
    }
    drop((listener, closing));
    tokio::time::sleep(LAST_CALL).await;
    let _ = close.send(true);
    close.closed().await;
}

/// As many connections as was asked for, or as the operating system lets a process
/// have.
fn connections_max(asked: u32, pool_size: u32) -> usize {
    let most = allowed_files().map_or(u64::MAX, |files| connections_within(files, pool_size));
    if most < u64::from(asked) {
        warn!(
            connections_max = most,
            "the limit of open files (ulimit -n) allows fewer connections than CONNECTIONS_MAX"
        );
    }
    usize::try_from(most.min(asked.into())).unwrap_or(usize::MAX)
}

/// How many connections so many open files are enough for: a file each, and some for
/// those that are refused, for the database, and for others. A flood of connections
/// then leaves the writer its own.
fn connections_within(files: u64, pool_size: u32) -> u64 {
    let others = u64::from(pool_size) + FILES_OF_OTHERS + REFUSED_AT_ONCE as u64;
    files.saturating_sub(others).max(1)
}

/// How many files the process may have open, raised as far as it may be; `None` is no
/// limit.
fn allowed_files() -> Option<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    let allowed = limit.current;
    limit.current = limit.maximum;
    match setrlimit(Resource::Nofile, limit) {
        Ok(()) => limit.maximum,
        Err(_) => allowed,
    }
}

/// Comes when the time to finish is over.
async fn deadline(mut stopping: Stopping) {
    let end = stopping.wait_for(Option::is_some).await.map(|end| *end);
    match end {
        Ok(Some(end)) => sleep_until(end).await,
        _ => pending().await,
    }
}

/// A database that starts together with the service is waited for; one that
/// cannot be served from is not.
async fn wait_until_fit(server: &Server) -> Result<(), PreflightError> {
    let end = Instant::now() + START_PATIENCE;
    let mut pauses = db::backoff();
    loop {
        match db::check(server).await {
            Err(unfit)
                if Instant::now() < end
                    && unfit
                        .database_error()
                        .is_some_and(|error| ErrorClass::of(error) == ErrorClass::Transient) =>
            {
                warn!(error = %unfit, "PostgreSQL does not answer yet");
                tokio::time::sleep(pauses.next().unwrap_or_default()).await;
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::{
        body::{Body, Bytes},
        routing::get,
    };
    use futures::stream;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    /// Bytes to a service with these time-outs, on a connection of its own.
    async fn connect(timeouts: Timeouts) -> (TcpStream, watch::Sender<Option<Instant>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopping) = watch::channel(None);
        let chunk = || Ok::<_, Infallible>(Bytes::from(vec![b'x'; 65_536]));
        let endless = move || async move { Body::from_stream(stream::repeat_with(chunk)) };
        let router = Router::new()
            .route("/endless", get(endless))
            .route("/", get(|| async { "answer" }));
        tokio::spawn(serve(listener, router, 10, timeouts, stopping));
        (TcpStream::connect(address).await.unwrap(), stop)
    }

    #[test]
    fn connections_leave_files_to_the_database() {
        for (files, pool_size) in [(1024, 10), (4096, 10), (1 << 20, 1000)] {
            let served = connections_within(files, pool_size);
            // As many sockets as the accept loop ever holds.
            let sockets = served + REFUSED_AT_ONCE as u64;
            assert_eq!(files - sockets, u64::from(pool_size) + 64);
        }
        assert_eq!(connections_within(100, 10), 1);
    }

    async fn is_closed(stream: &mut TcpStream) {
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest));
        let _ = closed.await.expect("the connection stays open");
    }

    #[tokio::test]
    async fn a_head_that_never_ends_loses_its_connection() {
        let timeouts = Timeouts {
            head: Duration::from_millis(200),
            ..TIMEOUTS
        };
        let (mut stream, _stop) = connect(timeouts).await;
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        is_closed(&mut stream).await;
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed() {
        let timeouts = Timeouts {
            idle: Duration::from_millis(200),
            ..TIMEOUTS
        };
        let (mut stream, _stop) = connect(timeouts).await;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        is_closed(&mut stream).await;
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_loses_its_connection() {
        let timeouts = Timeouts {
            stall: Duration::from_millis(200),
            ..TIMEOUTS
        };
        let (mut stream, _stop) = connect(timeouts).await;
        let request = b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        // Aborted: what was not read is gone, and the end is an error.
        let ends = async {
            loop {
                let ready = stream.ready(tokio::io::Interest::ERROR).await.unwrap();
                if ready.is_error() {
                    break;
                }
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), ends);
        ended.await.expect("the connection stays open");
    }

    /// Without keeping the stop waiting for its deadline.
    #[tokio::test]
    async fn a_stop_closes_what_is_not_worked_on() {
        let (mut stream, stop) = connect(TIMEOUTS).await;
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        stop.send(Some(Instant::now() + Duration::from_hours(1)))
            .unwrap();
        is_closed(&mut stream).await;
    }
}
