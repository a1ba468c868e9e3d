//! The faults between client and service.
//!
//! A client says in headers what is to become of its request (it has drawn it
//! from the seed); the proxy does it and takes the headers off. Each request
//! that it forwards goes into the ledger, also where the client gets to see
//! another answer or none.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;

use super::{
    ledger::{KeyId, Ledger, Operation, Said},
    script::{Fate, Kind},
};
use crate::cli::Failure;

/// Which key, which cart, which replica, and what happens on the way.
#[derive(Debug, Clone, Copy)]
pub struct Routing {
    pub key: KeyId,
    pub kind: Kind,
    pub cart: u8,
    pub replica: usize,
    pub fate: Fate,
    pub delay_ms: u64,
}

const HEADER: &str = "storm-routing";

impl Routing {
    /// For the header that the proxy takes off.
    pub fn header(&self) -> (&'static str, String) {
        let Self {
            key: KeyId { customer, number },
            kind,
            cart,
            replica,
            fate,
            delay_ms,
        } = self;
        (
            HEADER,
            format!(
                "{customer} {number} {} {cart} {replica} {} {delay_ms}",
                kind.name(),
                fate.name()
            ),
        )
    }

    fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut words = headers.get(HEADER)?.to_str().ok()?.split(' ');
        Some(Self {
            key: KeyId {
                customer: words.next()?.parse().ok()?,
                number: words.next()?.parse().ok()?,
            },
            kind: words
                .next()
                .and_then(|name| Kind::ALL.into_iter().find(|kind| kind.name() == name))?,
            cart: words.next()?.parse().ok()?,
            replica: words.next()?.parse().ok()?,
            fate: words
                .next()
                .and_then(|name| Fate::ALL.into_iter().find(|fate| fate.name() == name))?,
            delay_ms: words.next()?.parse().ok()?,
        })
    }
}

/// What came back from the service.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub should_retry: Option<bool>,
    pub replayed: bool,
    pub body: Arc<str>,
}

impl Reply {
    /// What it means for a key of this kind.
    pub fn said(&self, kind: Kind) -> Said {
        Said::of(kind, self.status, &self.body)
    }
}

/// The deployment under test, without faults in between.
#[derive(Debug)]
pub struct Service {
    http: reqwest::Client,
    targets: Vec<String>,
    authorization: String,
    ledger: Arc<Ledger>,
}

/// How long the service is waited for at the start.
const START_PATIENCE: Duration = Duration::from_secs(5);

/// How long a single request may take: longer than the service's own deadline.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

impl Service {
    pub fn new(targets: Vec<String>, api_key: &str, ledger: Arc<Ledger>) -> Result<Self, Failure> {
        let http = reqwest::Client::builder()
            .timeout(REQUEST_TIMEOUT)
            .build()?;
        Ok(Self {
            http,
            targets,
            authorization: format!("Bearer {api_key}"),
            ledger,
        })
    }

    /// Whether it answers, and knows the API key. One that does not answer may
    /// be on its way up, and is waited for a little.
    pub async fn is_there(&self) -> Result<(), Failure> {
        let give_up = Instant::now() + START_PATIENCE;
        for target in &self.targets {
            let answer = loop {
                let request = self
                    .http
                    .get(format!("{target}/v1/charges?limit=1"))
                    .header("authorization", &self.authorization);
                match request.send().await {
                    Ok(answer) if answer.status().is_server_error() && Instant::now() < give_up => {
                    }
                    Ok(answer) => break answer,
                    Err(_) if Instant::now() < give_up => {}
                    Err(error) => {
                        return Err(format!("{target} does not answer: {}", cause(&error)).into());
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            };
            match answer.status().as_u16() {
                200 => {}
                401 => return Err(format!("{target} does not know this API key").into()),
                status => return Err(format!("{target}/v1/charges answers {status}").into()),
            }
        }
        Ok(())
    }

    /// Asks for a charge or a change, and puts what comes back into the ledger.
    pub async fn ask(&self, routing: Routing, path: &str, key: &str, body: Bytes) -> Option<Reply> {
        let mut entry = Pending {
            service: self,
            routing,
            called: self.ledger.now(),
            returned: None,
            status: None,
            said: Said::Unknown,
            replayed: false,
        };
        let target = &self.targets[routing.replica % self.targets.len()];
        let reply = self
            .http
            .post(format!("{target}{path}"))
            .header("authorization", &self.authorization)
            .header("content-type", "application/json")
            .header("idempotency-key", key)
            .body(body)
            .send();
        let reply = async { Self::read(reply.await?).await }.await;
        match &reply {
            Ok(reply) => {
                entry.returned = Some(self.ledger.now());
                entry.status = Some(reply.status);
                entry.said = reply.said(routing.kind);
                entry.replayed = reply.replayed;
            }
            Err(error) if error.is_connect() => entry.said = Said::Unreached,
            Err(_) => {}
        }
        reply.ok()
    }

    async fn read(response: reqwest::Response) -> Result<Reply, reqwest::Error> {
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let should_retry = header("stripe-should-retry").map(|value| value == "true");
        let replayed = header("idempotent-replayed") == Some("true");
        let status = response.status().as_u16();
        let body = response.bytes().await?;
        Ok(Reply {
            status,
            should_retry,
            replayed,
            body: String::from_utf8_lossy(&body).into(),
        })
    }

    /// Reads a page or a charge, trying each replica; `None` where it is not there.
    pub async fn get(&self, path: &str) -> Option<Value> {
        for target in &self.targets {
            let request = self
                .http
                .get(format!("{target}{path}"))
                .header("authorization", &self.authorization);
            let Ok(response) = request.send().await else {
                continue;
            };
            if response.status() == StatusCode::NOT_FOUND {
                return Some(Value::Null);
            }
            if response.status() != StatusCode::OK {
                continue;
            }
            if let Ok(body) = response.bytes().await {
                return serde_json::from_slice(&body).ok();
            }
        }
        None
    }
}

/// An entry that is made whatever becomes of the request: a future that is
/// dropped in the middle has sent something, and nobody knows what came of it.
struct Pending<'a> {
    service: &'a Service,
    routing: Routing,
    called: Duration,
    returned: Option<Duration>,
    status: Option<u16>,
    said: Said,
    replayed: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let operation = Operation {
            kind: self.routing.kind,
            cart: self.routing.cart,
            called: self.called,
            returned: self.returned,
            status: self.status,
            said: self.said.clone(),
            replayed: self.replayed,
        };
        self.service.ledger.record(self.routing.key, operation);
    }
}

/// What went wrong, without the URL, which may hold a password.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// The proxy, listening on the loopback interface for as long as it lives.
#[derive(Debug)]
pub struct FaultProxy {
    pub address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FaultProxy {
    pub async fn start(service: Arc<Service>) -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of file descriptors, most likely: some are freed soon.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let service = Arc::clone(&service);
                tokio::spawn(async move {
                    let respond = service_fn(move |request| weather(Arc::clone(&service), request));
                    // An error of ours is how a connection is cut.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), respond)
                        .await;
                });
            }
        });
        Ok(Self { address, task })
    }
}

/// Ends the connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the storm cut the connection")]
struct Cut;

async fn weather(
    service: Arc<Service>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Cut> {
    let (parts, body) = request.into_parts();
    let routing = Routing::from_headers(&parts.headers).ok_or(Cut)?;
    let key = parts
        .headers
        .get("idempotency-key")
        .and_then(|key| key.to_str().ok())
        .ok_or(Cut)?
        .to_owned();
    let path = parts.uri.path().to_owned();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let forward = |routing: Routing| {
        let (service, body) = (Arc::clone(&service), body.clone());
        let (path, key) = (path.clone(), key.clone());
        async move { service.ask(routing, &path, &key, body).await }
    };
    let pause = Duration::from_millis(routing.delay_ms);
    let reply = match routing.fate {
        Fate::Dropped => return Err(Cut),
        Fate::Passed => forward(routing).await,
        Fate::Delayed => {
            tokio::time::sleep(pause).await;
            forward(routing).await
        }
        Fate::AnswerLost => {
            // The work is not the connection's: it goes on although we go.
            tokio::spawn(forward(routing)).await.ok();
            return Err(Cut);
        }
        Fate::HungUp => {
            // Dropped in the middle, together with its connection to the service.
            let _ = tokio::time::timeout(pause / 20, forward(routing)).await;
            return Err(Cut);
        }
        Fate::BadGateway => {
            forward(routing).await;
            let response = Response::builder()
                .status(StatusCode::BAD_GATEWAY)
                .body(Full::default());
            return response.map_err(|_| Cut);
        }
        Fate::Duplicated => {
            let second = Routing {
                replica: routing.replica + 1,
                ..routing
            };
            let (first, second) = tokio::join!(
                tokio::spawn(forward(routing)),
                tokio::spawn(forward(second))
            );
            first.ok().flatten().or(second.ok().flatten())
        }
    };
    let reply = reply.ok_or(Cut)?;
    let mut response = Response::builder().status(reply.status);
    if let Some(should_retry) = reply.should_retry {
        response = response.header(
            "stripe-should-retry",
            if should_retry { "true" } else { "false" },
        );
    }
    response
        .body(Full::from(reply.body.as_bytes().to_vec()))
        .map_err(|_| Cut)
}
