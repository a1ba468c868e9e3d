//! `/v1/charges`: the request's parameters, and the handlers.

use axum::{
    extract::{Path, RawQuery, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use serde::Serialize;
use tracing::warn;

use super::{
    App, DuplicateGuard,
    caller::Caller,
    command::{Command, FromParams},
    exchange::Exchange,
    json,
    params::{Params, missing, not_allowed},
};
use crate::{
    charges::{self, Charge, ChargeRequest, CreateCharge, FindsAnother, Guard},
    db,
    error::{BadParameter, Error, ParameterCode},
    ids::ChargeId,
    money::{AMOUNT_MAX, Amount, Currency},
    processor::sandbox,
    writer::Reply,
};

const CUSTOMER_MAX: usize = 255;
const SOURCE_MAX: usize = 255;
const DESCRIPTION_MAX: usize = 1000;
const LIST_LIMIT_MAX: i64 = 100;
const LIST_LIMIT_DEFAULT: i64 = 10;

impl FromParams for ChargeRequest {
    fn from_params(params: &mut Params) -> Result<Self, BadParameter> {
        let amount = params
            .integer("amount", 1, AMOUNT_MAX)?
            .and_then(Amount::new)
            .ok_or_else(|| missing("amount"))?;
        let currency = params
            .text("currency", 255)?
            .ok_or_else(|| missing("currency"))?;
        let currency = Currency::from_code(&currency).ok_or_else(|| {
            not_allowed(
                "currency",
                "must be an ISO 4217 code in lower case, such as usd.",
            )
        })?;
        Ok(Self {
            amount,
            currency,
            customer: params.text("customer", CUSTOMER_MAX)?,
            source: params.text("source", SOURCE_MAX)?,
            description: params.text("description", DESCRIPTION_MAX)?,
            metadata: params.metadata("metadata")?,
            capture: params.boolean("capture")?.unwrap_or(true),
        })
    }
}

/// `POST /v1/charges`
pub(super) async fn create(
    State(app): State<App>,
    headers: HeaderMap,
    command: Command<ChargeRequest>,
) -> Result<Response, Error> {
    let Command {
        scope,
        fingerprint,
        rule,
        keyed,
        request,
        wait,
        exchange,
    } = command;
    let means_it = allows_duplicate(&headers)?;
    let outcome = sandbox::decide(request.source.as_deref()).ok_or_else(|| {
        not_allowed(
            "source",
            "must be one of Stripe's test tokens, such as tok_visa.",
        )
    })?;
    let charge = Charge::decided(request, outcome, exchange.id);
    let answer = charge.answer();
    let finds_another = match app.duplicate_guard {
        DuplicateGuard::Off => None,
        _ if means_it => Some(FindsAnother::Allowed),
        DuplicateGuard::Warn => Some(FindsAnother::Warned),
        DuplicateGuard::Refuse => Some(FindsAnother::Refused),
    };
    let window = app.duplicate_guard_window;
    let command = CreateCharge {
        guard: finds_another.and_then(|finds| Guard::of(&charge, scope.account_id, window, finds)),
        scope,
        fingerprint,
        rule,
        keyed,
        charge,
        answer,
    };
    let charge_id = command.charge.id;
    let reply = app.writer.submit(command, wait, exchange.deadline).await?;
    if let Some(duplicate_of) = reply.duplicate_of {
        warn!(%charge_id, %duplicate_of, "a charge looks like another one, under another key");
    }
    Ok(answer_with(reply))
}

/// `GET /v1/charges/{id}`
pub(super) async fn retrieve(
    State(app): State<App>,
    exchange: Exchange,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    Params::from_form(query.unwrap_or_default().as_bytes())?.finish()?;
    let missing = Error::ResourceMissing { param: None };
    // A path that is not UTF-8 names no charge.
    let Path(id) = id.map_err(|_| missing.clone())?;
    let id: ChargeId = id.parse().map_err(|_| missing.clone())?;
    let charge = find(&app, exchange, caller, id).await?.ok_or(missing)?;
    Ok(json(StatusCode::OK, charge.to_json()))
}

/// `GET /v1/charges`
pub(super) async fn list(
    State(app): State<App>,
    exchange: Exchange,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let mut params = Params::from_form(query.unwrap_or_default().as_bytes())?;
    let limit = params
        .integer("limit", 1, LIST_LIMIT_MAX)?
        .unwrap_or(LIST_LIMIT_DEFAULT);
    let after = params.text("starting_after", 255)?;
    params.finish()?;

    let after = match after {
        None => None,
        Some(id) => {
            let missing = Error::ResourceMissing {
                param: Some("starting_after"),
            };
            let id: ChargeId = id.parse().map_err(|_| missing.clone())?;
            find(&app, exchange, caller, id).await?.ok_or(missing)?;
            Some(id)
        }
    };
    // One more than asked for tells whether there are more.
    let mut charges = db::read(exchange.deadline, || {
        charges::list(&app.pool, caller.account_id, after, limit + 1)
    })
    .await?;
    let asked = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_more = charges.len() > asked;
    charges.truncate(asked);
    let list = List {
        object: "list",
        url: "/v1/charges",
        has_more,
        data: charges.iter().map(Charge::wire).collect(),
    };
    let body = serde_json::to_string(&list).map_err(|_| Error::Internal)?;
    Ok(json(StatusCode::OK, body))
}

/// Stripe's list object. Its clients page by `url`.
#[derive(Serialize)]
struct List<T> {
    object: &'static str,
    url: &'static str,
    has_more: bool,
    data: Vec<T>,
}

async fn find(
    app: &App,
    exchange: Exchange,
    caller: Caller,
    id: ChargeId,
) -> Result<Option<Charge>, Error> {
    let charge = db::read(exchange.deadline, || {
        charges::find(&app.pool, caller.account_id, id)
    })
    .await?;
    Ok(charge)
}

/// Whether the request says that it is no duplicate of one that it looks like.
fn allows_duplicate(headers: &HeaderMap) -> Result<bool, Error> {
    let mut values = headers.get_all("payonce-allow-duplicate").iter();
    match (values.next().map(HeaderValue::as_bytes), values.next()) {
        (None, _) | (Some(b"false"), None) => Ok(false),
        (Some(b"true"), None) => Ok(true),
        // Not ignored: a client that believes it said something would be wrong.
        _ => Err(Error::Parameter(BadParameter {
            code: ParameterCode::Invalid,
            param: Some("Payonce-Allow-Duplicate".to_owned()),
            message: "Payonce-Allow-Duplicate must be true or false.".to_owned(),
        })),
    }
}

fn answer_with(reply: Reply) -> Response {
    let Reply {
        answer,
        replayed,
        duplicate_of,
    } = reply;
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
    let mut response = json(status, answer.body.to_string());
    let headers = response.headers_mut();
    if !status.is_success() {
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert("stripe-should-retry", HeaderValue::from_static("false"));
    }
    if let Some(charge) = duplicate_of
        && let Ok(charge) = HeaderValue::from_str(&charge.to_string())
    {
        headers.insert("payonce-duplicate-of", charge);
    }
    if replayed {
        headers.insert("idempotent-replayed", HeaderValue::from_static("true"));
    }
    response
}
