//! Liveness and readiness.

use axum::{extract::State, http::StatusCode, response::Response};
use tracing::warn;

use super::{App, json};
use crate::{
    db,
    error::{Error, Unavailable},
};

/// `GET /healthz`: the process answers. Asks nobody, so that a database that is
/// away does not get the service restarted.
pub(super) async fn live() -> Response {
    json(StatusCode::OK, r#"{"status":"ok"}"#.to_owned())
}

/// `GET /readyz`: PostgreSQL takes charges now.
pub(super) async fn ready(State(app): State<App>) -> Result<Response, Error> {
    match db::within(db::READ_TIMEOUT, db::ready(&app.pool)).await {
        Ok(true) => return Ok(json(StatusCode::OK, r#"{"status":"ready"}"#.to_owned())),
        Ok(false) => warn!("not ready: PostgreSQL is a standby, or a privilege is missing"),
        Err(error) => warn!(error = %db::describe(&error), "not ready"),
    }
    Err(Error::Unavailable(Unavailable::Database))
}
