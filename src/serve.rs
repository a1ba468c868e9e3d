//! `payonce serve`: starts the parts, and ends them in order.

use std::{
    future::{pending, ready},
    io,
    net::SocketAddr,
    time::Duration,
};

use axum::{
    http::{HeaderValue, header::CONNECTION},
    middleware::map_response,
    response::Response,
    serve::{Listener, ListenerExt},
};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use crate::{
    cli::Failure,
    config::Serve,
    db::{self, Server, Trouble, Unfit},
    http::{self, App, caller::Callers},
    idempotency::purge,
    writer::{self, Writer},
};

/// How long a database that is not there yet is waited for at the start.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// How long idle connections stay open after SIGTERM. Axum closes them at once,
/// also those on which a request has just arrived that nobody has read yet.
const LAST_CALL: Duration = Duration::from_millis(250);

/// Runs until SIGTERM or SIGINT, and then until what was taken is done.
///
/// # Errors
/// What keeps the service from starting, or that it was cut off at the end.
pub async fn run(config: Serve) -> Result<(), Failure> {
    let options = db::connect_options(&config.database.database_url).map_err(Unfit::from)?;
    let server = if config.transaction_pooler {
        Server::behind_pooler(options)
    } else {
        Server::direct(options)
    };
    wait_until_fit(&server).await?;

    let pool = server.pool(config.pool_size);
    let writer = Writer::start(writer::Options {
        server,
        batch_max: config.batch_max.into(),
        queue_max: config.queue_max,
        answer_ttl: config.answer_ttl,
    });
    let purge = tokio::spawn(purge::run_forever(pool.clone(), config.purge_interval));
    let app = App {
        callers: Callers::new(pool.clone()),
        pool: pool.clone(),
        writer: writer.clone(),
        wait: config.duplicate_wait,
    };

    let listener = TcpListener::bind(&config.listen_addr)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", config.listen_addr))?;
    let address = listener.local_addr()?;
    let (stop, stopping) = watch::channel(None);
    let door = Door {
        listener: Some(listener),
        address,
        stopping: stopping.clone(),
    };
    let door = door.tap_io(|stream| {
        // An answer is one small packet, and must not wait for another.
        if let Err(error) = stream.set_nodelay(true) {
            warn!(%error, "TCP_NODELAY was refused");
        }
    });
    let asked_to_stop = stopping.clone();
    let router = http::router(app).layer(map_response(move |mut response: Response| {
        if asked_to_stop.borrow().is_some() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        ready(response)
    }));
    let mut asked_to_stop = stopping.clone();
    let server = axum::serve(door, router).with_graceful_shutdown(async move {
        let _ = asked_to_stop.changed().await;
        tokio::time::sleep(LAST_CALL).await;
    });
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

    // First the connections, then the writer, since the connections wait for it.
    let late = tokio::select! {
        result = server => { result?; false }
        () = deadline(stopping.clone()) => true,
    };
    purge.abort();
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

/// Takes connections until it is told to stop, and those that were made by then.
struct Door {
    listener: Option<TcpListener>,
    address: SocketAddr,
    stopping: watch::Receiver<Option<Instant>>,
}

impl Listener for Door {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        if let Some(listener) = &mut self.listener {
            tokio::select! {
                biased;
                taken = Listener::accept(listener) => return taken,
                _ = self.stopping.wait_for(Option::is_some) => {}
            }
        }
        self.listener = None;
        pending().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// Comes when the time to finish is over.
async fn deadline(mut stopping: watch::Receiver<Option<Instant>>) {
    if stopping.changed().await.is_err() {
        return std::future::pending().await;
    }
    let end = *stopping.borrow();
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// A database that starts together with the service is waited for; one that
/// cannot be served from is not.
async fn wait_until_fit(server: &Server) -> Result<(), Unfit> {
    let end = Instant::now() + START_PATIENCE;
    let mut pauses = db::backoff();
    loop {
        match db::check(server).await {
            Err(Unfit::Unreachable(error))
                if Trouble::of(&error) == Trouble::Passing && Instant::now() < end =>
            {
                warn!(error = %db::describe(&error), "PostgreSQL does not answer yet");
                tokio::time::sleep(pauses.next().unwrap_or_default()).await;
            }
            other => return other,
        }
    }
}
