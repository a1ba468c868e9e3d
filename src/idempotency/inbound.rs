//! What comes in from elsewhere: events of a source, messages of a queue. Each
//! is accepted once, and a duplicate is accepted and not done again.
//!
//! Whoever takes a message accepts it and does its work in one transaction. If
//! the process dies before COMMIT, neither is there, and the next delivery does
//! it; after COMMIT the next delivery is a duplicate. If the answer to COMMIT is
//! lost, the message is delivered again, and meets whichever of the two is true.
//! Two consumers that get one message at once: the key's row lets one through,
//! and the other is told that the message is in use until the first commits.

use sha2::{Digest, Sha256};
use sqlx::{PgConnection, types::Uuid};

use super::{
    Answer, Duplicate, Fingerprint, Key, KeyClaim, Rules, Scenario, Scope, claim, store::NewRow,
};
use crate::{
    db::replication,
    ids::{AccountId, RequestId},
};

/// By what one message is told from another.
#[derive(Debug, Clone, Copy)]
pub enum Identity<'a> {
    /// An event of a webhook's source: the source, and the event's id there.
    Event(&'a str, &'a str),
    /// A message with an id of its own: the queue, and the id.
    Message(&'a str, &'a str),
    /// An e-mail that is to be sent: the key of whoever asks for it.
    Email(&'a Key),
    /// A message without an id that names its deduplication id: the queue, and it.
    DeduplicationId(&'a str, &'a str),
    /// A message with neither: the queue, and the body, byte for byte.
    Body(&'a str, &'a [u8]),
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It is the first of its kind: do its work in this transaction.
    New,
    /// It was done already, or is done by this transaction: say that it is
    /// accepted, and do nothing.
    Duplicate,
    /// The same, where the rule says that duplicates are refused.
    Refused,
    /// Another transaction is at it: ask again in a moment.
    InUse,
}

impl Identity<'_> {
    fn scenario(&self) -> Scenario {
        match self {
            Self::Event(..) => Scenario::Webhook,
            Self::Message(..) => Scenario::Message,
            Self::Email(..) => Scenario::Email,
            Self::DeduplicationId(..) | Self::Body(..) => Scenario::MessageWithoutId,
        }
    }

    /// SHA-256 over kind and fields, each behind its length, so that no two
    /// identities give one.
    fn digest(&self) -> [u8; 32] {
        let (kind, fields): (u8, [&[u8]; 2]) = match self {
            Self::Event(source, id) => (0, [source.as_bytes(), id.as_bytes()]),
            Self::Message(queue, id) => (1, [queue.as_bytes(), id.as_bytes()]),
            Self::Email(key) => (2, [b"", key.as_str().as_bytes()]),
            Self::DeduplicationId(queue, id) => (3, [queue.as_bytes(), id.as_bytes()]),
            Self::Body(queue, body) => (4, [queue.as_bytes(), body]),
        };
        let mut hash = Sha256::new();
        hash.update([kind]);
        for field in fields {
            hash.update((field.len() as u64).to_be_bytes());
            hash.update(field);
        }
        hash.finalize().into()
    }
}

/// Accepts messages of an account, in the transaction in which their work is
/// done. The same one may stand among them twice.
///
/// Behind a synchronous standby commit with [`replication::warned`], and where it says so
/// [`replication::wait_for_standby`]: a wait that was cancelled is no acknowledgement.
///
/// # Errors
/// Any database error; nothing of the transaction may be kept then.
pub async fn accept(
    conn: &mut PgConnection,
    account_id: AccountId,
    messages: &[Identity<'_>],
    rules: &Rules,
) -> Result<Vec<Accepted>, sqlx::Error> {
    let accepted = Answer {
        status: 200,
        head: None,
        body: "null".into(),
    };
    let scopes: Vec<_> = messages
        .iter()
        .map(|message| Scope {
            account_id,
            key: Key::internal("inbound", &message.digest()),
        })
        .collect();
    let rows: Vec<_> = messages
        .iter()
        .zip(&scopes)
        .map(|(message, scope)| NewRow {
            scope,
            // What comes under an id is the message of that id, whatever it says.
            fingerprint: Fingerprint::of_nothing(),
            digests: None,
            operation_id: Uuid::now_v7(),
            request_id: RequestId::new(),
            answer: Some(&accepted),
            keep: rules.of(message.scenario()).keep,
        })
        .collect();
    let claims = claim(conn, &rows).await?;
    // "Duplicate" is said of rows that others wrote.
    let standbys =
        |claim: &KeyClaim| matches!(claim, KeyClaim::Answered(row) if row.written_by.is_some());
    if claims.iter().any(standbys) {
        replication::leave_record(conn).await?;
    }
    Ok(messages
        .iter()
        .zip(claims)
        .map(|(message, claim)| match claim {
            KeyClaim::Claimed => Accepted::New,
            KeyClaim::InUse => Accepted::InUse,
            KeyClaim::Answered(_) => match rules.of(message.scenario()).duplicate {
                Duplicate::Refuse => Accepted::Refused,
                Duplicate::Skip | Duplicate::Replay => Accepted::Duplicate,
            },
        })
        .collect())
}
