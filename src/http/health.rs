//! Liveness and readiness.

use axum::{extract::State, http::StatusCode, response::Response};
use tracing::warn;

use super::{App, json};
use crate::{
    db::{self, Readiness},
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
        Ok(Readiness::Ready) => {
            return Ok(json(StatusCode::OK, r#"{"status":"ready"}"#.to_owned()));
        }
        Ok(Readiness::StandbyAway) => {
            warn!("not ready: no synchronous standby confirms what is written");
            return Err(Error::Unavailable(Unavailable::StandbyAway));
        }
        Ok(Readiness::ReadOnly) => warn!("not ready: PostgreSQL is a standby, or read-only"),
        Ok(Readiness::NotPrivileged) => warn!("not ready: a privilege is missing"),
        Err(error) => warn!(error = %db::describe(&error), "not ready"),
    }
    Err(Error::Unavailable(Unavailable::Database))
}
