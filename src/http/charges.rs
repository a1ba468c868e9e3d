//! `/v1/charges`: the request's parameters, and the handlers.

use axum::{
    extract::{Path, RawQuery, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use tracing::warn;
use uuid::Uuid;

use super::{
    App, DuplicateGuard,
    caller::Caller,
    command::{Command, FromParams},
    json,
    list_query::{ListQuery, list_of},
    params::{Params, missing, not_allowed},
    request_context::RequestContext,
};
use crate::{
    changes::{CaptureRequest, ChangeCharge, ChargeChange},
    charges::{self, Charge, ChargeRequest, ChargeUpdate, CreateCharge, FindsAnother, Guard},
    db,
    error::{BadParameter, Error, ParameterCode},
    idempotency::Scope,
    ids::ChargeId,
    money::{AMOUNT_MAX, Amount, Currency},
    processor::sandbox,
    writer::{self, Reply},
};

pub(super) const CUSTOMER_MAX: usize = 255;
pub(super) const SOURCE_MAX: usize = 255;
pub(super) const DESCRIPTION_MAX: usize = 1000;

impl FromParams for ChargeRequest {
    fn from_params(params: &mut Params) -> Result<Self, BadParameter> {
        let amount = params
            .integer("amount", 1, AMOUNT_MAX)?
            .and_then(Amount::new)
            .ok_or_else(|| missing("amount"))?;
        let currency = params
            .text("currency", 255)?
            .ok_or_else(|| missing("currency"))?;
        // Whether it is in use is asked later: this may be a retry.
        let currency = Currency::from_stored(&currency).ok_or_else(unknown_currency)?;
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

impl FromParams for ChargeUpdate {
    fn from_params(params: &mut Params) -> Result<Self, BadParameter> {
        let (metadata, clears_metadata) = params.metadata_update("metadata")?;
        Ok(Self {
            description: params.text_or_none("description", DESCRIPTION_MAX)?,
            metadata,
            clears_metadata,
        })
    }
}

impl FromParams for CaptureRequest {
    fn from_params(params: &mut Params) -> Result<Self, BadParameter> {
        let amount = params.integer("amount", 1, AMOUNT_MAX)?;
        Ok(Self {
            amount: amount.and_then(Amount::new),
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
        digests,
        rule,
        keyed,
        request,
        wait,
        context,
    } = command;
    let means_it = allows_duplicate(&headers)?;
    if !request.currency.is_in_use() && !is_made(&app, context, &scope).await? {
        return Err(unknown_currency().into());
    }
    let outcome = sandbox::decide(request.source.as_deref()).ok_or_else(|| {
        not_allowed(
            "source",
            "must be one of Stripe's test tokens, such as tok_visa.",
        )
    })?;
    let charge = Charge::decided(request, outcome, context.id);
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
        digests,
        rule,
        keyed,
        charge,
        answer,
    };
    let charge_id = command.charge.id;
    let command = writer::Command::CreateCharge(Box::new(command));
    let reply = app.writer.submit(command, wait, context.deadline).await?;
    if let Some(duplicate_of) = reply.duplicate_of
        && !reply.replayed
    {
        warn!(%charge_id, %duplicate_of, "a charge looks like another one, under another key");
    }
    Ok(answer_with(reply))
}

fn unknown_currency() -> BadParameter {
    not_allowed(
        "currency",
        "must be an ISO 4217 code in lower case, such as usd.",
    )
}

/// Whether a charge carries the key. Then the request can make no other one: it is
/// replayed or refused, also where its currency has been retired since.
async fn is_made(app: &App, context: RequestContext, scope: &Scope) -> Result<bool, Error> {
    let _turn = app.admission.turn(context.deadline).await?;
    let made = db::read(context.deadline, || charges::of_key(&app.pool, scope)).await?;
    Ok(made.is_some())
}

/// `POST /v1/charges/{id}`
pub(super) async fn update(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
    command: Command<ChargeUpdate>,
) -> Result<Response, Error> {
    let (command, update) = command.split();
    change(&app, charge_id(id)?, command, ChargeChange::Update(update)).await
}

/// `POST /v1/charges/{id}/capture`
pub(super) async fn capture(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
    command: Command<CaptureRequest>,
) -> Result<Response, Error> {
    let (command, request) = command.split();
    change(
        &app,
        charge_id(id)?,
        command,
        ChargeChange::Capture(request),
    )
    .await
}

/// Has a change done, and answers with what it came to.
pub(super) async fn change(
    app: &App,
    charge_id: ChargeId,
    command: Command<()>,
    change: ChargeChange,
) -> Result<Response, Error> {
    let change = ChangeCharge {
        scope: command.scope,
        fingerprint: command.fingerprint,
        digests: command.digests,
        rule: command.rule,
        keyed: command.keyed,
        operation_id: Uuid::now_v7(),
        request_id: command.context.id,
        charge_id,
        change,
    };
    let submitted = writer::Command::ChangeCharge(Box::new(change));
    let reply = app
        .writer
        .submit(submitted, command.wait, command.context.deadline)
        .await?;
    Ok(answer_with(reply))
}

/// `GET /v1/charges/{id}`
pub(super) async fn retrieve(
    State(app): State<App>,
    context: RequestContext,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    Params::from_form(query.unwrap_or_default().as_bytes())?.finish()?;
    let id = charge_id(id)?;
    let missing = Error::ResourceMissing { param: None };
    let charge = find(&app, context, caller, id).await?.ok_or(missing)?;
    Ok(json(StatusCode::OK, charge.to_json()))
}

/// From a path; one that is malformed, or not UTF-8, names no charge.
fn charge_id(id: Result<Path<String>, PathRejection>) -> Result<ChargeId, Error> {
    id.ok()
        .and_then(|Path(id)| id.parse().ok())
        .ok_or(Error::ResourceMissing { param: None })
}

/// `GET /v1/charges`
pub(super) async fn list(
    State(app): State<App>,
    context: RequestContext,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let mut params = Params::from_form(query.unwrap_or_default().as_bytes())?;
    let customer = params.text("customer", CUSTOMER_MAX)?;
    let query = ListQuery::<ChargeId>::take(&mut params)?;
    params.finish()?;
    let there = |id| find(&app, context, caller, id);
    let page = query
        .page(async |id| Ok(there(id).await?.map(|charge| charge.id.0)))
        .await?;
    let _turn = app.admission.turn(context.deadline).await?;
    let rows = db::read(context.deadline, || {
        charges::list(&app.pool, caller.account_id, customer.as_deref(), &page)
    })
    .await?;
    let (charges, has_more) = page.of(rows);
    Ok(list_of(
        "/v1/charges",
        has_more,
        charges.iter().map(Charge::wire),
    ))
}

async fn find(
    app: &App,
    context: RequestContext,
    caller: Caller,
    id: ChargeId,
) -> Result<Option<Charge>, Error> {
    let charge = app.reader.charge(caller.account_id, id, context.deadline);
    charge.await
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
