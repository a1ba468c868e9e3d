//! The way in: every route and layer.

pub mod admission;
pub mod caller;
mod charges;
pub mod command;
mod health;
mod idempotency_keys;
pub mod limit;
mod list_query;
pub mod openapi;
mod pages;
pub mod params;
mod refunds;
pub mod request_context;

use std::time::Duration;

use axum::{
    Router,
    extract::{Path, rejection::PathRejection},
    http::{StatusCode, header},
    middleware::from_fn,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use sqlx::PgPool;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    error::{CATALOGUE, Error, Unavailable},
    idempotency::{Rules, held::HeldKeys},
    reader::Reader,
    writer::Writer,
};
use admission::Admission;
use caller::Callers;
use limit::Limits;

/// What the handlers work with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct App {
    /// Where reads go, each when it is its turn.
    pub pool: PgPool,
    /// Whose turn it is.
    pub admission: Admission,
    /// Which keys are held by transactions.
    pub held_keys: HeldKeys,
    /// Where reads of a charge by its id go.
    pub reader: Reader,
    /// Where everything goes that changes something.
    pub writer: Writer,
    /// Who is known.
    pub callers: Callers,
    /// How long a duplicate waits, unless it says so itself.
    pub wait: Duration,
    /// How long keys are kept.
    pub rules: Rules,
    /// How many requests an account may make.
    pub limits: Limits,
    /// What becomes of a POST without a key.
    pub keyless: Keyless,
    /// Whether charges are looked over that look like another one.
    pub duplicate_guard: DuplicateGuard,
    /// For how long.
    pub duplicate_guard_window: Duration,
}

/// What becomes of a POST without an `Idempotency-Key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Keyless {
    /// It is refused.
    Refuse,
    /// Its content is its key, for a few seconds.
    Fingerprint,
}

/// What becomes of a charge that looks like another one: the same account,
/// customer, amount and currency, under another key, within a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DuplicateGuard {
    /// Nothing: it is a charge like any other.
    Off,
    /// It is made; the answer names the other one, and so does the log.
    Warn,
    /// It is refused.
    Refuse,
}

/// The whole service as one [`tower`](https://docs.rs/tower) service.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/v1/charges", get(charges::list).post(charges::create))
        .route(
            "/v1/charges/{id}",
            get(charges::retrieve).post(charges::update),
        )
        .route("/v1/charges/{id}/capture", post(charges::capture))
        .route("/v1/refunds", get(refunds::list).post(refunds::create))
        .route("/v1/refunds/{id}", get(refunds::retrieve))
        .route(
            "/v1/idempotency_keys/{key}",
            get(idempotency_keys::retrieve),
        )
        .route("/healthz", get(health::live))
        .route("/readyz", get(health::ready))
        .route(
            "/openapi.json",
            get(|| async { json(StatusCode::OK, openapi::DOCUMENT.clone()) }),
        )
        .merge(pages::router())
        .merge(error_pages())
        .fallback(|| async { Error::RouteUnknown })
        .method_not_allowed_fallback(|| async { Error::MethodNotAllowed })
        .layer(CatchPanicLayer::custom(request_context::panicked))
        .layer(from_fn(request_context::attach))
        .with_state(app)
}

/// What a connection gets that there is no place for: that the process answers, and
/// else 503.
pub fn refusing_router() -> Router {
    Router::new()
        .route("/healthz", get(health::live))
        .fallback(|| async { Error::Unavailable(Unavailable::ConnectionsFull) })
        .layer(from_fn(request_context::attach))
}

/// The pages that errors point to, for a service that uses the layer.
pub fn error_pages<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/errors/{code}", get(explain))
}

/// `GET /errors/{code}`: what an error's `type` and `doc_url` point to.
async fn explain(code: Result<Path<String>, PathRejection>) -> Result<Response, Error> {
    let Path(code) = code.map_err(|_| Error::RouteUnknown)?;
    let entry = CATALOGUE
        .iter()
        .find(|entry| entry.code == code)
        .ok_or(Error::RouteUnknown)?;
    let page = format!(
        "# {}\n\n{} (HTTP {}, {})\n\n{}\n",
        entry.code, entry.title, entry.status, entry.error_type, entry.advice
    );
    Ok((
        [(header::CONTENT_TYPE, "text/markdown; charset=utf-8")],
        page,
    )
        .into_response())
}

fn json(status: StatusCode, body: String) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
