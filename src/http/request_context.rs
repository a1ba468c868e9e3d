//! The context of one HTTP request: its id, how long it may take, and errors in the one
//! shape that they have.

use std::{any::Any, convert::Infallible, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, Request},
    http::{HeaderValue, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tokio::time::Instant;
use tracing::{Level, debug, error, warn};

use crate::{error::Error, ids::RequestId};

/// How long after its arrival a request is still worked for, whatever it meets
/// on its way: an API key to be looked up, a body that comes slowly, a database
/// that is away.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// What is known of a request before anything was read of it.
#[derive(Debug, Clone, Copy)]
pub struct RequestContext {
    /// For the answer's header, and for the log.
    pub id: RequestId,
    /// When its answer has to be there.
    pub deadline: Instant,
}

impl RequestContext {
    fn begin() -> Self {
        Self {
            id: RequestId::new(),
            deadline: Instant::now() + DEADLINE,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for RequestContext {
    type Rejection = Infallible;

    /// The one that `attach` began; no handler can be reached but through it.
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let begun = parts.extensions.get().copied();
        Ok(begun.unwrap_or_else(Self::begin))
    }
}

/// Around everything: gives the request an id, writes the body of an error,
/// and logs what is not in order.
pub(super) async fn attach(mut request: Request, next: Next) -> Response {
    let context = RequestContext::begin();
    let id = context.id;
    let started = Instant::now();
    let method = request.method().clone();
    let as_stripe = request.headers().contains_key("stripe-version");
    request.extensions_mut().insert(context);

    let mut response = next.run(request).await;
    if let Some(mut error) = response.extensions_mut().remove::<Error>() {
        if as_stripe {
            error = error.as_stripe();
        }
        let (code, status) = (error.code(), error.status());
        *response.status_mut() =
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        match error.level() {
            Level::ERROR => error!(request_id = %id, code, status, "request failed"),
            Level::WARN => warn!(request_id = %id, code, status, "request failed"),
            _ => debug!(request_id = %id, code, status, "request refused"),
        }
        *response.body_mut() = Body::from(error.body(id));
    }
    if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert("request-id", value);
    }
    response.headers_mut().insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    debug!(
        request_id = %id,
        %method,
        status = response.status().as_u16(),
        elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "request"
    );
    response
}

/// The whole response for an error, where no `attach` is around.
pub(crate) fn respond(error: &Error, id: RequestId) -> Response {
    let mut response = error.clone().into_response();
    response.extensions_mut().remove::<Error>();
    *response.body_mut() = Body::from(error.body(id));
    response
}

impl IntoResponse for Error {
    /// Status and headers; `attach` writes the body, since it knows the id.
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = StatusCode::from_u16(status)
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            .into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        let should_retry = if self.should_retry() { "true" } else { "false" };
        headers.insert(
            "stripe-should-retry",
            HeaderValue::from_static(should_retry),
        );
        if let Self::RateLimited { retry_after } = self {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after));
        } else if self.should_retry() && matches!(status, 409 | 503) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == 401 {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer, Basic realm=\"payonce\""),
            );
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// What a client gets when a handler panics; the writer's work goes on.
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    // The message could hold anything; where it happened is on standard error.
    drop(panic);
    error!("a handler panicked");
    Error::Internal.into_response()
}
