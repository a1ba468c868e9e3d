//! Idempotency: a key names one operation, and its first answer is the answer.
//!
//! A key is in one of four states, and its row in `idempotency_keys` is the
//! only authority on which:
//!
//! | state | row | charge with the key | what a request with the key gets |
//! | --- | --- | --- | --- |
//! | free | none | none | it claims the key, and is charged |
//! | in progress | without answer, or not committed yet | none | it waits, then the replay, or 409 |
//! | answered | with answer | one | same fingerprint: the replay; another: 422 |
//! | expired | with answer, `expires_at` past, or purged | one | the key is claimed anew for the charge that is there; then as answered |
//!
//! What holds in every state that can be seen from outside a transaction:
//!
//! 1. At most one charge carries a key (`charges_idempotency_key_key`).
//! 2. An answer that can be seen tells of a charge that can be seen: both are
//!    written in one transaction.
//! 3. An answer that can be seen never changes until it has expired.
//! 4. A row without an answer is never purged: it is a lock, and locks go with
//!    those who hold them.

mod fingerprint;
mod key;
pub mod purge;
pub mod store;

pub use fingerprint::Fingerprint;
pub use key::{KEY_MAX, Key, MalformedKey};

use crate::ids::AccountId;

/// Where a key is looked up: keys belong to an account, so that two merchants
/// may use the same text, and a rotated API key does not make a retry a new
/// request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope {
    /// Whose key it is.
    pub account_id: AccountId,
    /// The key.
    pub key: Key,
}

/// Status and body: what is stored with a key and given again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status: 200 or 402 for a charge.
    pub status: u16,
    /// The body, byte for byte.
    pub body: std::sync::Arc<str>,
}
