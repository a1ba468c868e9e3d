//! `/v1/idempotency_keys/{key}`: what became of a key, for a client that lost
//! its answer and its patience.
//!
//! 404 says that nothing is there yet, and not that nothing will be: a request can
//! still be on its way, or wait in another replica's queue, for as long as a
//! request may take. Who takes it for "never" and mints a new key pays twice.

use axum::{
    extract::{Path, RawQuery, State, rejection::PathRejection},
    http::StatusCode,
    response::Response,
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use super::{App, caller::Caller, json, params::Params, request_context::RequestContext};
use crate::{
    charges, db,
    error::Error,
    idempotency::{
        Key, Scope,
        store::{self, History},
    },
    ids::{ChargeId, RefundId},
    refunds,
};

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wire<'a> {
    /// `idempotency_key`
    object: &'a str,
    key: &'a str,
    /// `in_progress` or `answered`
    state: &'a str,
    /// When the key was first used, in seconds since 1970.
    #[schema(required)]
    created: Option<i64>,
    /// Until when the answer is kept; null if it is not, or not any more.
    #[schema(required)]
    expires_at: Option<i64>,
    #[schema(required)]
    response_status: Option<u16>,
    /// The charge that was made under the key.
    #[schema(required)]
    charge: Option<ChargeId>,
    /// The refund that was made under the key.
    #[schema(required)]
    refund: Option<RefundId>,
}

/// `GET /v1/idempotency_keys/{key}`
pub(super) async fn retrieve(
    State(app): State<App>,
    context: RequestContext,
    caller: Caller,
    key: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    Params::from_form(query.unwrap_or_default().as_bytes())?.finish()?;
    let missing = Error::ResourceMissing { param: None };
    let key = key
        .ok()
        .and_then(|Path(key)| Key::from_header(key.as_bytes()).ok());
    let scope = Scope {
        account_id: caller.account_id,
        key: key.ok_or_else(|| missing.clone())?,
    };
    // Asked for on both sides, since what is at it here has written its row when
    // it is at it no more.
    let was_at_it = app.writer.is_in_flight(&scope);
    let _turn = app.admission.turn(context.deadline).await?;
    let history = db::read(context.deadline, || {
        store::history(&app.pool, &app.held_keys, &scope)
    })
    .await?;
    let at_it = was_at_it && history == History::Unknown
        || history == History::InUse
        || app.writer.is_in_flight(&scope);
    let (created, answered) = match history {
        History::Answered { created, answered } if !at_it => (Some(created), answered),
        History::Unknown if !at_it => (None, None),
        _ => return Ok(wire(&scope, "in_progress", None, None, None, None)),
    };
    let charge = db::read(context.deadline, || charges::of_key(&app.pool, &scope)).await?;
    let refund = db::read(context.deadline, || refunds::of_key(&app.pool, &scope)).await?;
    let made = charge
        .map(ChargeId::created_at)
        .or(refund.map(RefundId::created_at));
    // The row was purged, and what it made is there.
    let created: Option<DateTime<Utc>> = created.or(made);
    let created = created.ok_or(missing)?;
    Ok(wire(
        &scope,
        "answered",
        Some(created),
        answered,
        charge,
        refund,
    ))
}

fn wire(
    scope: &Scope,
    state: &str,
    created: Option<DateTime<Utc>>,
    answered: Option<(u16, DateTime<Utc>)>,
    charge: Option<ChargeId>,
    refund: Option<RefundId>,
) -> Response {
    let wire = Wire {
        object: "idempotency_key",
        key: scope.key.as_str(),
        state,
        created: created.map(|at| at.timestamp()),
        expires_at: answered.map(|(_, at)| at.timestamp()),
        response_status: answered.map(|(status, _)| status),
        charge,
        refund,
    };
    let body = serde_json::to_string(&wire).expect("plain data is always JSON");
    json(StatusCode::OK, body)
}
