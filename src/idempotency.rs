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
//! What outlives the answer: a charge and a refund carry their key for good. A
//! capture happens once by itself, so its very late retry is told that it did. An
//! update is forgotten with its answer. Over kinds of operation a key is
//! remembered as long as its answer is kept: a day later a refund's key can name a
//! charge.
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
pub mod held;
pub mod inbound;
mod key;
mod policy;
pub mod purge;
pub mod store;

pub use fingerprint::{Blank, FieldDigests, Fingerprint, Fingerprinted};
pub use key::{KEY_MAX, Key, MalformedKey};
pub use policy::{Duplicate, Rule, RuleOverride, Rules, Scenario};

use sqlx::PgConnection;

use crate::ids::AccountId;
use store::{KeyRow, NewRow};

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
    /// What else belongs to it, as JSON, where status and body are not all.
    pub head: Option<std::sync::Arc<str>>,
    /// The body, byte for byte.
    pub body: std::sync::Arc<str>,
}

/// Why a key was not to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// It has an answer.
    Answered(KeyRow),
    /// Its answer had expired, and it is free now: claim it again.
    Freed,
    /// Somebody is at it: ask again in a moment.
    InUse,
}

/// What became of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyClaim {
    /// The key is this transaction's.
    Claimed,
    /// It has an answer.
    Answered(KeyRow),
    /// Somebody is at it: ask again in a moment.
    InUse,
}

/// The general form's first step: claims keys, takes those over whose answers
/// have expired, and says of the others why they were not to be had. Then comes
/// the work, then [`store::answer`], then COMMIT.
///
/// One statement where all keys are free, two where some have answers, at most
/// seven where some have expired as well. Never waits for another transaction,
/// unless that one inserted its row without the try-lock.
///
/// # Errors
/// Any database error; nothing of the transaction may be kept then.
pub async fn claim(
    conn: &mut PgConnection,
    rows: &[NewRow<'_>],
) -> Result<Vec<KeyClaim>, sqlx::Error> {
    let mut claims = vec![KeyClaim::InUse; rows.len()];
    let mut open: Vec<usize> = (0..rows.len()).collect();
    // Twice: a key that was freed can still go to another of the same slice.
    for _ in 0..2 {
        if open.is_empty() {
            break;
        }
        let wanted: Vec<_> = open.iter().map(|&i| rows[i]).collect();
        let got = store::claim(conn, &wanted).await?;
        let mut taken = Vec::new();
        for (i, got) in open.into_iter().zip(got) {
            if got {
                claims[i] = KeyClaim::Claimed;
            } else {
                taken.push(i);
            }
        }
        open = Vec::new();
        if taken.is_empty() {
            break;
        }
        let scopes: Vec<_> = taken.iter().map(|&i| rows[i].scope).collect();
        for (i, why) in taken
            .into_iter()
            .zip(resolve_conflicts(conn, &scopes).await?)
        {
            match why {
                Conflict::Answered(row) => claims[i] = KeyClaim::Answered(row),
                Conflict::Freed => open.push(i),
                Conflict::InUse => {}
            }
        }
    }
    Ok(claims)
}

/// Says of keys that could not be claimed why, and frees those whose answers
/// have expired.
///
/// # Errors
/// Any database error.
pub async fn resolve_conflicts(
    conn: &mut PgConnection,
    scopes: &[&Scope],
) -> Result<Vec<Conflict>, sqlx::Error> {
    let rows = store::read(conn, scopes).await?;
    let mut expired = Vec::new();
    let mut why = Vec::with_capacity(scopes.len());
    for (i, row) in rows.into_iter().enumerate() {
        why.push(match row {
            Some(row) if row.expired => {
                expired.push(i);
                Conflict::InUse
            }
            Some(row) if row.answer.is_some() => Conflict::Answered(row),
            // KeyClaim and not answered, or not to be seen yet, or purged this
            // very moment: all of them pass.
            Some(_) | None => Conflict::InUse,
        });
    }
    if !expired.is_empty() {
        let scopes: Vec<_> = expired.iter().map(|&i| scopes[i]).collect();
        let freed = store::free_expired(conn, &scopes).await?;
        for (i, freed) in expired.into_iter().zip(freed) {
            if freed {
                why[i] = Conflict::Freed;
            }
        }
    }
    Ok(why)
}
