//! Changes of charges: captures, refunds and updates. Each is a command under a
//! key, like a charge.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    charges::{Charge, ChargeUpdate, Refusal},
    error::Error,
    idempotency::{
        Answer, Blank, FieldDigests, Fingerprint, Fingerprinted, Rule, Scope, store::NewRow,
    },
    ids::{ChargeId, RefundId, RequestId},
    money::Amount,
    refunds::{Refund, RefundRequest},
};

/// What a client asks for when it captures, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// How much; all that was authorised, if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub amount: Option<Amount>,
}

impl Fingerprinted for CaptureRequest {
    const OPTIONAL: &'static [(&'static str, Option<Blank>)] = &[("amount", Some(Blank::Null))];
}

/// What is to become of a charge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChargeChange {
    /// Its money is taken.
    Capture(CaptureRequest),
    /// Its money is given back.
    Refund(RefundRequest),
    /// Its description or metadata change.
    Update(ChargeUpdate),
}

/// A validated change of a charge, as the writer takes it. What is answered is known
/// when the charge is locked, and not before.
#[derive(Debug, Clone)]
pub struct ChangeCharge {
    /// Whose key, and which.
    pub scope: Scope,
    /// Of the request.
    pub fingerprint: Fingerprint,
    /// Of its fields.
    pub digests: FieldDigests,
    /// How long the answer is kept, and what a duplicate gets.
    pub rule: Rule,
    /// Whether the key is the client's.
    pub keyed: bool,
    /// By which the work is found again; a refund has its id from it.
    pub operation_id: Uuid,
    /// In which it was asked for.
    pub request_id: RequestId,
    /// Of which charge.
    pub charge_id: ChargeId,
    /// What.
    pub change: ChargeChange,
}

/// What a charge says to a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It is done, with this answer; and with this refund, if it is one.
    Done(Answer, Option<Refund>),
    /// The charge's state does not allow it, and that is the answer.
    Refused(Answer),
}

impl ChangeCharge {
    /// About how much of it goes to the database, in bytes. How large the charge is that
    /// is read, written and answered is not known yet.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let (metadata, text) = match &self.change {
            ChargeChange::Capture(_) => return 1024,
            ChargeChange::Refund(request) => (&request.metadata, 0),
            ChargeChange::Update(update) => (
                &update.metadata,
                update.description.as_ref().map_or(0, String::len),
            ),
        };
        let metadata: usize = metadata
            .iter()
            .map(|(name, text)| name.len() + text.len())
            .sum();
        2 * (metadata + text) + 1024
    }

    /// The row of its key while it is not answered yet.
    #[must_use]
    pub fn row(&self) -> NewRow<'_> {
        NewRow {
            scope: &self.scope,
            fingerprint: self.fingerprint,
            digests: Some(self.digests.as_bytes()),
            operation_id: self.operation_id,
            request_id: self.request_id,
            answer: None,
            keep: self.rule.keep,
        }
    }

    /// Does it to the charge, and says what is answered. After a refusal the charge is
    /// as before.
    #[must_use]
    pub fn decide(&self, charge: &mut Charge) -> Decision {
        let done = match &self.change {
            ChargeChange::Capture(request) => charge.capture(request.amount).map(|()| None),
            ChargeChange::Update(update) => charge.update(update).map(|()| None),
            ChargeChange::Refund(request) => charge
                .refund(request.amount)
                .map(|amount| Some(self.refund(charge, request, amount))),
        };
        match done {
            Ok(None) => Decision::Done(charge.answer(), None),
            Ok(Some(refund)) => Decision::Done(refund.answer(), Some(refund)),
            Err(refusal) => Decision::Refused(self.refused(refusal)),
        }
    }

    fn refund(&self, charge: &Charge, request: &RefundRequest, amount: Amount) -> Refund {
        Refund {
            id: RefundId(self.operation_id),
            request_id: self.request_id,
            charge: charge.id,
            amount,
            currency: charge.request.currency,
            reason: request.reason,
            metadata: BTreeMap::clone(&request.metadata),
        }
    }

    fn refused(&self, refusal: Refusal) -> Answer {
        let error = Error::ChargeRefuses {
            refusal,
            charge: self.charge_id,
        };
        Answer {
            status: error.status(),
            head: None,
            body: error.body(self.request_id).into(),
        }
    }
}
