//! Everything that can go wrong, and what the client is told about it. This is
//! the only place that gives status, code and log level.
//!
//! A body speaks two dialects at once: an RFC 9457 client reads the top level,
//! a Stripe SDK reads `error`. The cause of a fault is logged where it is met;
//! what goes to the client never holds an internal message.

use serde::Serialize;
use tracing::Level;
use utoipa::ToSchema;

use crate::{
    charges::Refusal,
    db::ErrorClass,
    idempotency::MalformedKey,
    ids::{ChargeId, RequestId},
    processor::Decline,
};

/// What is sent instead of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// No API key, or none that is known.
    ApiKeyInvalid,
    /// No such path.
    RouteUnknown,
    /// The path is there, the method is not.
    MethodNotAllowed,
    /// More than the limit, in bytes.
    BodyTooLarge(usize),
    /// Neither JSON nor a form.
    MediaTypeUnsupported,
    /// A POST without `Idempotency-Key`.
    KeyMissing,
    /// An `Idempotency-Key` that is none.
    KeyInvalid(MalformedKey),
    /// A parameter or the body as a whole is wrong.
    Parameter(BadParameter),
    /// The key belongs to another request, which differs in these fields, if that
    /// is known.
    KeyReused(Option<Vec<String>>),
    /// The same, for a client that speaks as Stripe's SDKs do: they raise their
    /// `IdempotencyError` for 400 alone.
    KeyReusedAsStripe(Option<Vec<String>>),
    /// The charge's state does not allow it. An outcome, not a fault: it is stored.
    ChargeRefuses {
        /// Why.
        refusal: Refusal,
        /// Which.
        charge: ChargeId,
    },
    /// More requests of the account than its limit allows.
    RateLimited {
        /// After which pause the next one is let through, in seconds.
        retry_after: u64,
    },
    /// The key's first request still runs after the wait.
    KeyInUse,
    /// A request that was made before, where a rule says that it is not
    /// replayed.
    DuplicateRequest {
        /// The request in which it was.
        original: RequestId,
        /// The charge that it made, if that is what it did.
        charge: Option<ChargeId>,
    },
    /// The same customer was charged the same under another key, a moment ago.
    DuplicateCharge(ChargeId),
    /// The processor declined. An outcome, not a fault: it is stored.
    Declined {
        /// Why.
        decline: Decline,
        /// The failed charge.
        charge: ChargeId,
    },
    /// Nothing of this name, or another account's.
    ResourceMissing {
        /// In the path it is the resource itself, else the parameter that names it.
        param: Option<&'static str>,
    },
    /// The service cannot do it now; the same request may be sent again.
    Unavailable(Unavailable),
    /// A bug of ours. Nothing is known to be stored.
    Internal,
}

/// What is in the way of a request that was in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unavailable {
    /// As many commands wait as the queue may hold.
    QueueFull,
    /// As many reads wait as may wait.
    ReadsFull,
    /// There are as many connections as may be.
    ConnectionsFull,
    /// The body did not arrive within the request's deadline.
    BodyLate,
    /// The handler of a service that uses the layer took too long.
    HandlerLate,
    /// The service stops, and had no time left to finish this.
    ShuttingDown,
    /// The database did not answer, or not within the request's deadline.
    Database,
    /// No synchronous standby of the database answers, so that nothing that is
    /// written can be acknowledged.
    StandbyAway,
    /// A newer release wrote the key's row, and this one cannot compare with it.
    NewerRelease,
}

/// A parameter that is wrong, named as Stripe names it: `metadata[order]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadParameter {
    /// Which rule was broken.
    pub code: ParameterCode,
    /// Which parameter; `None` if the body as a whole cannot be read.
    pub param: Option<String>,
    /// What is wrong with it, for a person; never repeats the value.
    pub message: String,
}

/// The rule that a parameter broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterCode {
    /// It is required.
    Missing,
    /// There is no such parameter.
    Unknown,
    /// It came twice.
    Repeated,
    /// It is empty.
    InvalidEmpty,
    /// It has to be an integer.
    InvalidInteger,
    /// Its type or value is not allowed.
    Invalid,
    /// The body is not JSON, not a form, or not UTF-8.
    Unreadable,
}

/// A line of the catalogue: what all errors of one code have in common.
#[derive(Debug)]
pub struct Entry {
    /// Stable and unique; clients match on it.
    pub code: &'static str,
    /// HTTP status.
    pub status: u16,
    /// `error.type`, from Stripe's set and ours.
    pub error_type: &'static str,
    /// One line for a person.
    pub title: &'static str,
    /// What the client does about it.
    pub advice: &'static str,
    same_key: bool,
    new_key: bool,
    level: Level,
}

impl Entry {
    /// A body of this code, to show what it looks like.
    pub(crate) fn example(&self) -> serde_json::Value {
        let page = format!("/errors/{}", self.code);
        serde_json::json!({
            "type": page,
            "title": self.title,
            "status": self.status,
            "detail": format!("{}. {}", self.title, self.advice),
            "instance": "req_01a20d6e5ab875ee8183cb72603abe26",
            "retry": {"same_key": self.same_key, "new_key": self.new_key},
            "error": {
                "type": self.error_type,
                "code": self.code,
                "message": format!("{}. {}", self.title, self.advice),
                "param": null,
                "decline_code": null,
                "charge": null,
                "doc_url": page,
            },
        })
    }

    /// A client's mistake: not to be sent again as it stands.
    const fn refusal(
        code: &'static str,
        status: u16,
        error_type: &'static str,
        title: &'static str,
        advice: &'static str,
    ) -> Self {
        Self {
            code,
            status,
            error_type,
            title,
            advice,
            same_key: false,
            new_key: false,
            level: Level::DEBUG,
        }
    }

    /// What a charge's state does not allow: final under its key.
    const fn outcome(code: &'static str, title: &'static str, advice: &'static str) -> Self {
        Self {
            new_key: true,
            ..Self::refusal(code, 400, INVALID, title, advice)
        }
    }

    /// A decline: final under its key, and open to a new operation.
    const fn decline(code: &'static str, title: &'static str) -> Self {
        Self {
            new_key: true,
            ..Self::refusal(
                code,
                402,
                "card_error",
                title,
                "The outcome is stored and replayed under this key. To try another card, send a new request under a new key.",
            )
        }
    }

    /// To be sent again under the same key, after a pause.
    const fn retryable(
        code: &'static str,
        status: u16,
        error_type: &'static str,
        title: &'static str,
        advice: &'static str,
        level: Level,
    ) -> Self {
        Self {
            same_key: true,
            level,
            ..Self::refusal(code, status, error_type, title, advice)
        }
    }
}

const INVALID: &str = "invalid_request_error";

/// Every code there is, with what it means.
pub const CATALOGUE: &[Entry] = &[
    Entry::refusal(
        "api_key_invalid",
        401,
        "authentication_error",
        "The API key is missing or unknown",
        "Send a valid API key as Bearer token or as Basic user name. A revoked key stops working within 5 seconds.",
    ),
    Entry::refusal(
        "route_unknown",
        404,
        INVALID,
        "There is nothing at this path",
        "Check the path; the API's base path is /v1.",
    ),
    Entry::refusal(
        "method_not_allowed",
        405,
        INVALID,
        "This path does not take this method",
        "The Allow header lists the methods that the path takes.",
    ),
    Entry::refusal(
        "body_too_large",
        413,
        INVALID,
        "The body is too large",
        "Send at most 65,536 bytes.",
    ),
    Entry::refusal(
        "media_type_unsupported",
        415,
        INVALID,
        "The body's media type is not supported",
        "Send application/json or application/x-www-form-urlencoded, in UTF-8 and not compressed.",
    ),
    Entry::refusal(
        "idempotency_key_missing",
        400,
        INVALID,
        "The Idempotency-Key header is missing",
        "Send one header of this name with every POST: a text that names the operation and stays the same when it is asked for again.",
    ),
    Entry::refusal(
        "idempotency_key_invalid",
        400,
        INVALID,
        "The Idempotency-Key header is malformed",
        "Send one header of 1 to 255 visible ASCII characters, bare or as a quoted string.",
    ),
    Entry::refusal(
        "parameter_missing",
        400,
        INVALID,
        "A required parameter is missing",
        "Add the parameter that `param` names.",
    ),
    Entry::refusal(
        "parameter_unknown",
        400,
        INVALID,
        "A parameter is not known",
        "Remove the parameter that `param` names, or correct its name.",
    ),
    Entry::refusal(
        "parameter_repeated",
        400,
        INVALID,
        "A parameter was sent more than once",
        "Send the parameter that `param` names once.",
    ),
    Entry::refusal(
        "parameter_invalid_empty",
        400,
        INVALID,
        "A parameter is empty",
        "Give the parameter that `param` names a value, or leave it out.",
    ),
    Entry::refusal(
        "parameter_invalid_integer",
        400,
        INVALID,
        "A parameter is not an integer in its range",
        "Send a whole number, in JSON without quotes. Amounts are in the currency's minor unit.",
    ),
    Entry::refusal(
        "parameter_invalid",
        400,
        INVALID,
        "A parameter has a value that is not allowed",
        "Correct the parameter that `param` names.",
    ),
    Entry::refusal(
        "parameter_unreadable",
        400,
        INVALID,
        "The body cannot be read",
        "Send a JSON object, or a form, in UTF-8.",
    ),
    Entry {
        new_key: true,
        ..Entry::refusal(
            "idempotency_key_reused",
            422,
            "idempotency_error",
            "The idempotency key was used for another request",
            "A key names one operation. If this is a new operation, send it under a new key; if it is a retry, send what was sent first.",
        )
    },
    Entry::retryable(
        "idempotency_key_in_use",
        409,
        "idempotency_error",
        "The first request with this key is still running",
        "Ask again with the same key and the same request; its answer is replayed once it is there.",
        Level::DEBUG,
    ),
    Entry::refusal(
        "duplicate_request",
        409,
        "idempotency_error",
        "The same request was made a moment ago",
        "`error.charge` is the charge that it made, and `original_request_id` the request. If this is a new operation, send it with an Idempotency-Key of its own, or wait until the first one is forgotten.",
    ),
    Entry::refusal(
        "duplicate_charge",
        409,
        "idempotency_error",
        "The customer was charged the same amount a moment ago, under another key",
        "`error.charge` is that charge. A retry has to carry the key of the first try. If this is a new operation, send it with Payonce-Allow-Duplicate: true.",
    ),
    Entry::decline("card_declined", "The card was declined"),
    Entry::decline("expired_card", "The card has expired"),
    Entry::decline("incorrect_cvc", "The card's security code is incorrect"),
    Entry::decline("processing_error", "The card could not be processed"),
    Entry::refusal(
        "resource_missing",
        404,
        INVALID,
        "There is no such resource",
        "Check the id, and that it belongs to the account of the API key.",
    ),
    Entry::outcome(
        "charge_already_captured",
        "The charge was captured already",
        "A charge is captured once. Nothing is left to do, unless another amount was meant: the rest was released.",
    ),
    Entry::outcome(
        "charge_already_refunded",
        "The charge was refunded already",
        "Nothing of it is left.",
    ),
    Entry::outcome(
        "amount_too_large",
        "The amount is larger than what is left",
        "Ask for what is left at most, under a new key.",
    ),
    Entry::outcome(
        "charge_not_captured",
        "A part of an uncaptured charge cannot be refunded",
        "Capture the smaller amount, or refund it in full, which cancels it.",
    ),
    Entry::outcome(
        "charge_not_capturable",
        "The charge did not succeed, and cannot be captured",
        "Its failure_code says why it failed.",
    ),
    Entry::outcome(
        "charge_not_refundable",
        "The charge did not succeed, and cannot be refunded",
        "No money was taken.",
    ),
    Entry::outcome(
        "metadata_full",
        "The charge has as much metadata as it can hold",
        "A charge holds 50 names. Remove some by giving them an empty text.",
    ),
    Entry::retryable(
        "rate_limited",
        429,
        "rate_limit_error",
        "Too many requests",
        "Ask again with the same key after the pause that Retry-After gives. Nothing was done.",
        Level::DEBUG,
    ),
    Entry::retryable(
        "unavailable",
        503,
        "api_error",
        "The service cannot do this at the moment",
        "Ask again with the same key after the pause that Retry-After gives. Nobody is charged twice.",
        Level::WARN,
    ),
    Entry::retryable(
        "internal",
        500,
        "api_error",
        "Something went wrong on our side",
        "Asking again with the same key is safe: nobody is charged twice. Tell us the request id if it stays.",
        Level::ERROR,
    ),
];

impl Error {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::ApiKeyInvalid => "api_key_invalid",
            Self::RouteUnknown => "route_unknown",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::BodyTooLarge(_) => "body_too_large",
            Self::MediaTypeUnsupported => "media_type_unsupported",
            Self::KeyMissing => "idempotency_key_missing",
            Self::KeyInvalid(_) => "idempotency_key_invalid",
            Self::Parameter(bad) => match bad.code {
                ParameterCode::Missing => "parameter_missing",
                ParameterCode::Unknown => "parameter_unknown",
                ParameterCode::Repeated => "parameter_repeated",
                ParameterCode::InvalidEmpty => "parameter_invalid_empty",
                ParameterCode::InvalidInteger => "parameter_invalid_integer",
                ParameterCode::Invalid => "parameter_invalid",
                ParameterCode::Unreadable => "parameter_unreadable",
            },
            Self::KeyReused(_) | Self::KeyReusedAsStripe(_) => "idempotency_key_reused",
            Self::RateLimited { .. } => "rate_limited",
            Self::ChargeRefuses { refusal, .. } => match refusal {
                Refusal::AlreadyCaptured => "charge_already_captured",
                Refusal::AlreadyRefunded => "charge_already_refunded",
                Refusal::AmountTooLarge(_) => "amount_too_large",
                Refusal::NotCaptured => "charge_not_captured",
                Refusal::NotCapturable => "charge_not_capturable",
                Refusal::NotRefundable => "charge_not_refundable",
                Refusal::MetadataFull => "metadata_full",
            },
            Self::KeyInUse => "idempotency_key_in_use",
            Self::DuplicateRequest { .. } => "duplicate_request",
            Self::DuplicateCharge(_) => "duplicate_charge",
            Self::Declined { decline, .. } => CATALOGUE
                .iter()
                .find(|entry| entry.status == 402 && entry.code == decline.code)
                .map_or("card_declined", |entry| entry.code),
            Self::ResourceMissing { .. } => "resource_missing",
            Self::Unavailable(_) => "unavailable",
            Self::Internal => "internal",
        }
    }

    /// What all errors of this code have in common.
    ///
    /// # Panics
    /// Never: a test holds that every code has its line in the catalogue.
    #[must_use]
    pub fn entry(&self) -> &'static Entry {
        let code = self.code();
        CATALOGUE
            .iter()
            .find(|entry| entry.code == code)
            .expect("every code stands in the catalogue")
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::KeyReusedAsStripe(_) => 400,
            _ => self.entry().status,
        }
    }

    /// For a client that speaks as Stripe's SDKs do.
    #[must_use]
    pub fn as_stripe(self) -> Self {
        match self {
            Self::KeyReused(differs) => Self::KeyReusedAsStripe(differs),
            other => other,
        }
    }

    /// At which level the event is logged.
    #[must_use]
    pub fn level(&self) -> Level {
        self.entry().level
    }

    /// Whether a client does well to send the very request again.
    #[must_use]
    pub fn should_retry(&self) -> bool {
        self.entry().same_key
    }

    /// What is wrong this time, for a person.
    fn detail(&self) -> String {
        match self {
            Self::BodyTooLarge(limit) => format!("The body is larger than {limit} bytes."),
            Self::KeyInvalid(why) => format!("{why}."),
            Self::Parameter(bad) => bad.message.clone(),
            Self::Declined { decline, .. } => decline.message.clone(),
            Self::ChargeRefuses { refusal: Refusal::AmountTooLarge(left), .. } => {
                format!("The amount is larger than what is left, which is {left}.")
            }
            Self::Unavailable(Unavailable::QueueFull) => "Too many requests are waiting.".to_owned(),
            Self::Unavailable(Unavailable::ReadsFull) => "Too many reads are waiting.".to_owned(),
            Self::Unavailable(Unavailable::ConnectionsFull) => {
                "There are too many connections.".to_owned()
            }
            Self::Unavailable(Unavailable::BodyLate) => "The body did not arrive in time.".to_owned(),
            Self::Unavailable(Unavailable::HandlerLate) => "The request took too long.".to_owned(),
            Self::Unavailable(Unavailable::ShuttingDown) => "The service is stopping.".to_owned(),
            Self::Unavailable(Unavailable::StandbyAway) => "No synchronous standby of the database confirms what is written.".to_owned(),
            Self::Unavailable(Unavailable::Database) => "The database does not answer.".to_owned(),
            Self::Unavailable(Unavailable::NewerRelease) => {
                "The key was used with a newer release of the service, and this replica is not there yet.".to_owned()
            }
            _ => format!("{}. {}", self.entry().title, self.entry().advice),
        }
    }

    /// The body, as `application/problem+json`.
    ///
    /// # Panics
    /// Never: it holds strings, booleans and integers.
    #[must_use]
    pub fn body(&self, request_id: RequestId) -> String {
        let entry = self.entry();
        let detail = self.detail();
        let page = format!("/errors/{}", entry.code);
        let (decline_code, charge) = match self {
            Self::Declined { decline, charge } => (decline.decline_code.as_deref(), Some(*charge)),
            Self::DuplicateRequest { charge, .. } => (None, *charge),
            Self::DuplicateCharge(charge) | Self::ChargeRefuses { charge, .. } => {
                (None, Some(*charge))
            }
            _ => (None, None),
        };
        let problem = Problem {
            r#type: &page,
            title: entry.title,
            status: self.status(),
            detail: &detail,
            instance: request_id,
            original_request_id: match self {
                Self::DuplicateRequest { original, .. } => Some(*original),
                _ => None,
            },
            differs: match self {
                Self::KeyReused(differs) | Self::KeyReusedAsStripe(differs) => differs.as_deref(),
                _ => None,
            },
            retry: Retry {
                same_key: entry.same_key,
                new_key: entry.new_key,
            },
            error: StripeError {
                r#type: entry.error_type,
                code: entry.code,
                message: &detail,
                param: match self {
                    Self::Parameter(bad) => bad.param.as_deref(),
                    Self::ResourceMissing { param } => *param,
                    Self::ChargeRefuses { refusal, .. } => match refusal {
                        Refusal::AmountTooLarge(_) | Refusal::NotCaptured => Some("amount"),
                        Refusal::MetadataFull => Some("metadata"),
                        _ => None,
                    },
                    _ => None,
                },
                decline_code,
                charge,
                doc_url: &page,
            },
        };
        serde_json::to_string(&problem).expect("strings, booleans and integers are always JSON")
    }
}

impl From<BadParameter> for Error {
    fn from(bad: BadParameter) -> Self {
        Self::Parameter(bad)
    }
}

impl From<ErrorClass> for Error {
    fn from(class: ErrorClass) -> Self {
        match class {
            ErrorClass::Transient
            | ErrorClass::TableLocked
            | ErrorClass::RowLocked
            | ErrorClass::ResourceExhausted
            | ErrorClass::TimedOut
            | ErrorClass::Misconfigured => Self::Unavailable(Unavailable::Database),
            ErrorClass::Rejected => Self::Internal,
        }
    }
}

/// RFC 9457, with Stripe's `error` and our `retry` as extension members.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Problem<'a> {
    r#type: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    instance: RequestId,
    #[serde(skip_serializing_if = "Option::is_none")]
    original_request_id: Option<RequestId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    differs: Option<&'a [String]>,
    retry: Retry,
    error: StripeError<'a>,
}

/// Is it safe and useful to ask again?
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Retry {
    same_key: bool,
    new_key: bool,
}

/// The error as Stripe's SDKs read it.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StripeError<'a> {
    r#type: &'a str,
    /// Stable; clients match on it.
    code: &'a str,
    message: &'a str,
    /// The parameter that is wrong, in Stripe's bracket form.
    #[schema(required)]
    param: Option<&'a str>,
    #[schema(required)]
    decline_code: Option<&'a str>,
    /// The charge that the error is about.
    #[schema(required)]
    charge: Option<ChargeId>,
    doc_url: &'a str,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::processor::sandbox;

    #[test]
    fn a_code_stands_in_the_catalogue_once() {
        let codes: HashSet<_> = CATALOGUE.iter().map(|entry| entry.code).collect();
        assert_eq!(codes.len(), CATALOGUE.len());
    }

    #[test]
    fn every_decline_of_the_sandbox_has_a_code_of_its_own_in_the_catalogue() {
        for decline in sandbox::declines() {
            let error = Error::Declined {
                decline: decline.clone(),
                charge: ChargeId::new(),
            };
            assert_eq!(error.code(), decline.code);
        }
    }
}
