//! Processors move the money. The sandbox is built in.

use serde::Serialize;

pub mod sandbox;

/// What a processor said about a charge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The money moves.
    Approved,
    /// It does not. An outcome like any other: it is stored and replayed.
    Declined(Decline),
}

/// Why a charge was declined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decline {
    /// Stripe's error code, `card_declined` for most.
    pub code: String,
    /// The issuer's reason, where the code alone does not say it.
    pub decline_code: Option<String>,
    /// For a person.
    pub message: String,
}
