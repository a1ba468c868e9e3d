//! `payonce serve`: starts the parts, and ends them in order.

use std::{
    future::{pending, ready},
    time::Duration,
};

use axum::{
    Router,
    http::{HeaderValue, header::CONNECTION},
    middleware::map_response,
    response::Response,
    serve::Listener,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use crate::{
    accounts,
    cli::Failure,
    config,
    db::{self, READ_TIMEOUT, Server, Trouble, Unfit},
    http::{self, App, caller::Callers, limit::Limits},
    idempotency::purge,
    reader::Reader,
    writer::{self, Writer},
};

/// Says when everything has to be finished, once the service is asked to stop.
type Stopping = watch::Receiver<Option<Instant>>;

/// How long a database that is not there yet is waited for at the start.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may take for the head of a request, or stay idle: more
/// than the 60 s after which load balancers commonly close theirs, so that they
/// never send a request on one that is being closed here.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

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
    let reader = Reader::start(&server);
    let writer = Writer::start(writer::Options {
        server,
        batch_max: config.batch_max.into(),
        queue_max: config.queue_max,
    });
    let limits = Limits::per_second(config.rate_limit);
    let purge = tokio::spawn(purge::run_forever(pool.clone(), config.purge_interval));
    let app = App {
        callers: Callers::new(pool.clone()),
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
            limits.forget_the_quiet();
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
    let connections = serve(listener, http::router(app), IDLE_TIMEOUT, stopping.clone());
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
    idle_timeout: Duration,
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
    let connections = GracefulShutdown::new();
    loop {
        // What was connected before the stop is in the queue of the listener.
        let (stream, _) = tokio::select! {
            biased;
            taken = Listener::accept(&mut listener) => taken,
            _ = stopping.wait_for(Option::is_some) => break,
        };
        // An answer is one small packet, and must not wait for another.
        if let Err(error) = stream.set_nodelay(true) {
            warn!(%error, "TCP_NODELAY was refused");
        }
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(idle_timeout)
            .serve_connection(
                TokioIo::new(stream),
                TowerToHyperService::new(router.clone()),
            );
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(%error, "a connection broke");
            }
        });
    }
    drop(listener);
    tokio::time::sleep(LAST_CALL).await;
    connections.shutdown().await;
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
async fn wait_until_fit(server: &Server) -> Result<(), Unfit> {
    let end = Instant::now() + START_PATIENCE;
    let mut pauses = db::backoff();
    loop {
        match db::check(server).await {
            Err(unfit)
                if Instant::now() < end
                    && unfit
                        .database_error()
                        .is_some_and(|error| Trouble::of(error) == Trouble::Passing) =>
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
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    #[tokio::test]
    async fn a_head_that_never_ends_loses_its_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_stop, stopping) = watch::channel(None);
        let idle_timeout = Duration::from_millis(200);
        tokio::spawn(serve(listener, Router::new(), idle_timeout, stopping));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest));
        let _ = closed.await.expect("the connection stays open");
    }
}
