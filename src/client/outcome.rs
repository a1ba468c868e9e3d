//! What becomes of an operation, as its sender can know it.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;

use crate::{
    idempotency::Key,
    ids::{ChargeId, RequestId},
    money::{Amount, Currency},
};

/// The charge is there: made now, or by an earlier attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charged {
    /// What the service says of it.
    pub charge: Charge,
    /// Whether this answer was given before (`Idempotent-Replayed`). Says
    /// nothing of whether somebody saw it.
    pub replayed: bool,
    /// The request that brought it; the service's log has it.
    pub request_id: Option<RequestId>,
    /// The answer's body, byte for byte: the same for every replay.
    pub body: String,
}

/// A charge as the service tells it. Fields that are not known are passed over.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Charge {
    /// `ch_…`
    pub id: ChargeId,
    /// In the currency's minor unit.
    pub amount: Amount,
    /// ISO 4217, in lower case on the wire.
    pub currency: Currency,
    /// Where it stands.
    pub status: Status,
    /// Whether the processor approved; false while it is pending.
    pub paid: bool,
    /// Whether the money was taken, and not only authorised.
    pub captured: bool,
    /// By the service's clock, in Unix seconds.
    pub created: i64,
    /// The merchant's name for who pays.
    pub customer: Option<String>,
    /// The token of the card.
    pub source: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// For the merchant's programs.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

/// Where a charge stands. One that failed is [`Failure::Declined`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The processor has not said yet.
    Pending,
    /// The processor approved.
    Succeeded,
}

/// Why there is no charge, as far as that is certain. The module's doc argues it.
///
/// Holds neither API key nor body; the idempotency key only where it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Certainly not charged: the service refused the request, and no attempt
    /// before it got further. To be corrected; the key may be kept.
    Refused(Box<Refusal>),
    /// Certainly not charged: the processor declined. Final under this key;
    /// another card is another operation.
    Declined(Box<Decline>),
    /// The service refused the request, since its key belongs to another one, which
    /// may have charged. Whether this operation charged, or will, depends on what
    /// the other one is: see [`Refusal::names_another_charge`].
    KeyReused(Box<Refusal>),
    /// Certainly not charged: no connection came about, so nothing was sent. The
    /// text says why.
    NotSent(String),
    /// It may have been charged: send the same operation again, or another
    /// under the same key that asks for the same.
    Unknown {
        /// To ask again with.
        key: Key,
        /// How the last attempt ended. Says nothing of those before.
        last: Last,
    },
}

impl Failure {
    /// Whether the operation has charged nobody, and no attempt at it that is
    /// still on its way can. False is no proof of the contrary.
    #[must_use]
    pub fn certainly_not_charged(&self) -> bool {
        match self {
            Self::Refused(_) | Self::Declined(_) | Self::NotSent(_) => true,
            Self::KeyReused(refusal) => refusal.names_another_charge(),
            Self::Unknown { .. } => false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => write!(f, "certainly not charged: {refusal}"),
            Self::Declined(decline) => write!(f, "certainly not charged: {decline}"),
            Self::KeyReused(refusal) if refusal.names_another_charge() => write!(
                f,
                "certainly not charged by this request, but its key belongs to another, \
                 which may have charged: look at that one before you take a new key: {refusal}"
            ),
            Self::KeyReused(refusal) => write!(
                f,
                "this attempt charged nobody, but its key is in use by another request, and \
                 may have charged before or may charge once the other's answer has expired: \
                 look the key up (GET /v1/idempotency_keys/KEY names its charge), and do not \
                 send this again: {refusal}"
            ),
            Self::NotSent(cause) => write!(
                f,
                "certainly not charged: the service could not be reached: {cause}"
            ),
            Self::Unknown { key, last } => write!(
                f,
                "unknown whether it was charged: {last}; ask again with the same key: {}",
                key.to_header()
            ),
        }
    }
}

impl std::error::Error for Failure {}

/// An error of the service's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// From the service's catalogue, such as `api_key_invalid`.
    pub code: String,
    /// For a person.
    pub message: String,
    /// Which parameter is to blame, if one is.
    pub param: Option<String>,
    /// In which fields the request differs from the one that the key belongs to,
    /// where the service knows; `path` alone where that is no charge.
    pub differs: Option<Vec<String>>,
    /// The request; the service's log has it.
    pub request_id: Option<RequestId>,
}

impl Refusal {
    /// Whether a key that was used for another request was used for another
    /// *charge*. A charge carries its key for good, so no other one has been made
    /// under it, or ever will be.
    ///
    /// False where the other request is of another kind, such as a capture, or
    /// where the service does not say what differs: a key is remembered across
    /// kinds only as long as the answer is kept, 24 hours by default. A charge may
    /// have been made under it before, and a retry that comes after may make one.
    #[must_use]
    pub fn names_another_charge(&self) -> bool {
        self.differs
            .as_ref()
            .is_some_and(|fields| fields.iter().all(|field| field != "path"))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            status,
            code,
            message,
            ..
        } = self;
        write!(f, "{message} (HTTP {status}, {code}")?;
        if let Some(param) = &self.param {
            write!(f, ", {param}")?;
        }
        if let Some(request_id) = self.request_id {
            write!(f, ", {request_id}")?;
        }
        f.write_str(")")
    }
}

/// A decline: the outcome that is stored with the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decline {
    /// `card_declined`, `expired_card`, …
    pub code: String,
    /// The issuer's reason, where there is one.
    pub decline_code: Option<String>,
    /// For a person.
    pub message: String,
    /// The failed charge.
    pub charge: ChargeId,
    /// Whether this answer was given before.
    pub replayed: bool,
    /// The request; the service's log has it.
    pub request_id: Option<RequestId>,
}

impl fmt::Display for Decline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.message, self.code)?;
        if let Some(decline_code) = &self.decline_code {
            write!(f, ", {decline_code}")?;
        }
        write!(f, ", {})", self.charge)
    }
}

/// How an attempt ended that brought no outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Last {
    /// No connection came about, so nothing was sent.
    NotReached(String),
    /// No whole answer within the attempt's time.
    TimedOut,
    /// The connection broke before the answer was whole.
    Broken(String),
    /// The answer is not the service's, or of a release that speaks otherwise.
    NotUnderstood {
        /// HTTP status.
        status: u16,
    },
    /// The service refused this attempt, and did nothing.
    Refused(Box<Refusal>),
    /// The service could not say: 409, 429 or 5xx.
    Unavailable(Box<Refusal>),
}

impl Last {
    /// Whether this attempt has charged nobody, by itself.
    pub(super) fn is_harmless(&self) -> bool {
        match self {
            Self::NotReached(_) | Self::Refused(_) => true,
            Self::TimedOut
            | Self::Broken(_)
            | Self::NotUnderstood { .. }
            | Self::Unavailable(_) => false,
        }
    }
}

impl fmt::Display for Last {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReached(cause) => write!(f, "the service could not be reached: {cause}"),
            Self::TimedOut => f.write_str("no answer came in time"),
            Self::Broken(cause) => write!(f, "the connection broke: {cause}"),
            Self::NotUnderstood { status } => {
                write!(f, "the answer is not the service's (HTTP {status})")
            }
            Self::Refused(refusal) | Self::Unavailable(refusal) => write!(f, "{refusal}"),
        }
    }
}

/// The body of an error, as far as it matters here. Its own members (`status`,
/// `retry`) tell it from a gateway's.
#[derive(Deserialize)]
pub(super) struct Problem {
    pub status: u16,
    pub retry: Retry,
    differs: Option<Vec<String>>,
    error: StripeError,
}

#[derive(Deserialize)]
pub(super) struct Retry {
    pub same_key: bool,
}

#[derive(Deserialize)]
struct StripeError {
    code: String,
    message: String,
    param: Option<String>,
    decline_code: Option<String>,
    charge: Option<ChargeId>,
}

impl Problem {
    /// `None` if it names no failed charge.
    pub fn decline(&self, replayed: bool, request_id: Option<RequestId>) -> Option<Decline> {
        let error = &self.error;
        Some(Decline {
            code: error.code.clone(),
            decline_code: error.decline_code.clone(),
            message: error.message.clone(),
            charge: error.charge?,
            replayed,
            request_id,
        })
    }

    pub fn refusal(self, request_id: Option<RequestId>) -> Refusal {
        Refusal {
            status: self.status,
            code: self.error.code,
            message: self.error.message,
            param: self.error.param,
            differs: self.differs,
            request_id,
        }
    }
}
