//! `/v1/refunds`: the request's parameters, and the handlers.

use axum::{
    extract::{Path, RawQuery, State, rejection::PathRejection},
    http::StatusCode,
    response::Response,
};

use super::{
    App,
    caller::Caller,
    charges::change,
    command::{Command, FromParams},
    json,
    list_query::{ListQuery, list_of},
    params::{Params, missing, not_allowed},
    request_context::RequestContext,
};
use crate::{
    changes::ChargeChange,
    db,
    error::{BadParameter, Error},
    ids::{ChargeId, RefundId},
    money::{AMOUNT_MAX, Amount},
    refunds::{self, Reason, Refund, RefundRequest},
};

impl FromParams for RefundRequest {
    fn from_params(params: &mut Params) -> Result<Self, BadParameter> {
        let charge = params
            .text("charge", 255)?
            .ok_or_else(|| missing("charge"))?;
        let amount = params.integer("amount", 1, AMOUNT_MAX)?;
        let reason = params.text("reason", 255)?;
        Ok(Self {
            charge: charge
                .parse()
                .map_err(|_| not_allowed("charge", "must be the id of a charge, ch_…"))?,
            amount: amount.and_then(Amount::new),
            reason: reason
                .map(|name| {
                    Reason::from_name(&name).ok_or_else(|| {
                        not_allowed(
                            "reason",
                            "must be duplicate, fraudulent or requested_by_customer.",
                        )
                    })
                })
                .transpose()?,
            metadata: params.metadata("metadata")?,
        })
    }
}

/// `POST /v1/refunds`
pub(super) async fn create(
    State(app): State<App>,
    command: Command<RefundRequest>,
) -> Result<Response, Error> {
    let (command, request) = command.split();
    change(&app, request.charge, command, ChargeChange::Refund(request)).await
}

/// `GET /v1/refunds/{id}`
pub(super) async fn retrieve(
    State(app): State<App>,
    context: RequestContext,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    Params::from_form(query.unwrap_or_default().as_bytes())?.finish()?;
    let missing = Error::ResourceMissing { param: None };
    let id: Option<RefundId> = id.ok().and_then(|Path(id)| id.parse().ok());
    let id = id.ok_or_else(|| missing.clone())?;
    let _turn = app.admission.turn(context.deadline).await?;
    let refund = find(&app, context, caller, id).await?.ok_or(missing)?;
    Ok(json(StatusCode::OK, refund.answer().body.to_string()))
}

/// `GET /v1/refunds`
pub(super) async fn list(
    State(app): State<App>,
    context: RequestContext,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let mut params = Params::from_form(query.unwrap_or_default().as_bytes())?;
    let charge = params.text("charge", 255)?;
    let query = ListQuery::<RefundId>::take(&mut params)?;
    params.finish()?;
    let charge: Option<ChargeId> = charge
        .map(|id| {
            id.parse()
                .map_err(|_| not_allowed("charge", "must be the id of a charge, ch_…"))
        })
        .transpose()?;
    let _turn = app.admission.turn(context.deadline).await?;
    let page = query
        .page(async |id| {
            let there = find(&app, context, caller, id).await?;
            Ok(there.map(|refund| refund.id.0))
        })
        .await?;
    let rows = db::read(context.deadline, || {
        refunds::list(&app.pool, caller.account_id, charge, &page)
    })
    .await?;
    let (refunds, has_more) = page.of(rows);
    Ok(list_of(
        "/v1/refunds",
        has_more,
        refunds.iter().map(Refund::wire),
    ))
}

/// For those whose turn it is.
async fn find(
    app: &App,
    context: RequestContext,
    caller: Caller,
    id: RefundId,
) -> Result<Option<Refund>, Error> {
    let refund = db::read(context.deadline, || {
        refunds::find(&app.pool, caller.account_id, id)
    })
    .await?;
    Ok(refund)
}
