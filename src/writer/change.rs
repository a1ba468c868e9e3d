//! Changes of charges in a batch: the general form.
//!
//! Claim the keys, lock the charges in the order of their ids, decide in memory,
//! write, answer. A charge that another transaction holds is passed over: the
//! changes of it give their keys up and come back in a moment, and decide on what
//! the other has left. So the sum of refunds never exceeds what was captured. The
//! database's constraints hold that too.
//!
//! Key, answer, charge and refund are one transaction, so what the writer's tables
//! say of a process that dies, and of a COMMIT whose answer is lost, holds here as
//! it does for new charges: nothing is there, or all of it, and a retry finds which
//! by its operation's id. Two replicas with one key: the key's row lets one through;
//! with two keys and one charge: the charge's lock does.
//!
//! A key's row is purged when its answer has expired, and the refund or the charge that
//! was made under it stays. So before a refusal is stored (the charge has nothing left,
//! is captured already, is not there) it is looked whether the key has made something
//! long ago: then that is the answer, or the 422, and not a refusal that would send
//! its reader to refund once more under a new key. What is not refused meets the unique
//! index of `refunds` instead, and the batch is run again with a look beforehand.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use sqlx::PgConnection;

use super::{KeyRecord, batch::AttemptOutcome};
use crate::{
    changes::{ChangeCharge, ChargeChange, Decision},
    charges,
    error::Error,
    idempotency::{self, Answer, KeyClaim, Scope, store},
    refunds,
};

/// Whether an error says that a refund of an earlier time carries a key whose row
/// was purged: the batch has to be done again, and look for such refunds first.
/// Not looked for always, since it is a round trip, and very late retries are rare.
pub(super) fn met_an_old_refund(error: &sqlx::Error) -> bool {
    // The primary key: it is this very refund, whose COMMIT was lost and whose
    // answer has expired since.
    matches!(
        error
            .as_database_error()
            .and_then(|error| error.constraint()),
        Some("refunds_idempotency_key_key" | "refunds_pkey")
    )
}

/// What `begin` and `commit` go around. `check_purged_refunds`: looks for refunds that carry a
/// key although its row is gone.
pub(super) async fn write(
    conn: &mut PgConnection,
    changes: &[&ChangeCharge],
    check_purged_refunds: bool,
) -> Result<Vec<AttemptOutcome>, sqlx::Error> {
    let rows: Vec<_> = changes.iter().map(|change| change.row()).collect();
    let mut found = Vec::with_capacity(changes.len());
    let mut claimed = Vec::new();
    for (i, claim) in idempotency::claim(conn, &rows)
        .await?
        .into_iter()
        .enumerate()
    {
        found.push(match claim {
            KeyClaim::Answered(row) => AttemptOutcome::row(row)?,
            KeyClaim::InUse => AttemptOutcome::Held,
            KeyClaim::Claimed => {
                claimed.push(i);
                AttemptOutcome::Held
            }
        });
    }
    let mut answers: Vec<(usize, Arc<KeyRecord>)> = Vec::new();
    if check_purged_refunds {
        claimed = settle_old(conn, changes, claimed, &mut answers).await?;
    }
    let Performed {
        refused,
        missing,
        held,
    } = perform(conn, changes, &claimed, &mut answers).await?;
    let missing = settle_refused(conn, changes, refused, missing, &mut answers).await?;

    let rows: Vec<_> = answers
        .iter()
        .map(|(i, row)| store::NewRow {
            fingerprint: row.fingerprint,
            digests: row.digests.as_deref(),
            operation_id: row.operation_id,
            request_id: row.request_id,
            answer: Some(&row.answer),
            ..changes[*i].row()
        })
        .collect();
    if !rows.is_empty() {
        store::answer(conn, &rows).await?;
    }
    if !missing.is_empty() || !held.is_empty() {
        // What is held is `AttemptOutcome::Held` already, and comes back.
        let undone = missing.iter().chain(&held);
        let scopes: Vec<&Scope> = undone.map(|&i| &changes[i].scope).collect();
        store::release(conn, &scopes).await?;
    }
    for i in missing {
        let param = match changes[i].change {
            ChargeChange::Refund(_) => Some("charge"),
            ChargeChange::Capture(_) | ChargeChange::Update(_) => None,
        };
        found[i] = AttemptOutcome::Undone(Error::ResourceMissing { param });
    }
    for (i, row) in answers {
        found[i] = AttemptOutcome::Row(row);
    }
    Ok(found)
}

/// What became of claimed changes that have no answer yet, by their positions.
#[derive(Default)]
struct Performed {
    /// The charge's state does not allow it, with what is to be answered.
    refused: Vec<(usize, Arc<KeyRecord>)>,
    /// The charge is not there.
    missing: Vec<usize>,
    /// Another transaction holds the charge.
    held: Vec<usize>,
}

/// Does the claimed changes, notes the answers of those that are done, and says what
/// became of the others.
async fn perform(
    conn: &mut PgConnection,
    changes: &[&ChangeCharge],
    claimed: &[usize],
    answers: &mut Vec<(usize, Arc<KeyRecord>)>,
) -> Result<Performed, sqlx::Error> {
    let id = |i: usize| (changes[i].scope.account_id, changes[i].charge_id);
    let ids: BTreeSet<_> = claimed.iter().map(|&i| id(i)).collect();
    if ids.is_empty() {
        return Ok(Performed::default());
    }
    let mut locked = charges::lock(conn, &ids).await?;
    let absent: BTreeSet<_> = ids
        .into_iter()
        .filter(|id| !locked.contains_key(id))
        .collect();
    let there = if absent.is_empty() {
        HashSet::new()
    } else {
        charges::existing_ids(conn, &absent).await?
    };
    let mut performed = Performed::default();
    let (mut made, mut dirty) = (Vec::new(), HashSet::new());
    for &i in claimed {
        let Some(found) = locked.get_mut(&id(i)) else {
            if there.contains(&id(i)) {
                performed.held.push(i);
            } else {
                performed.missing.push(i);
            }
            continue;
        };
        let before = found.charge.clone();
        match changes[i].decide(&mut found.charge) {
            Decision::Done(answer, refund) => {
                made.extend(refund.map(|refund| (i, refund)));
                answers.push((i, own(changes[i], answer)));
            }
            Decision::Refused(answer) => performed.refused.push((i, own(changes[i], answer))),
        }
        if found.charge != before {
            dirty.insert(id(i));
        }
    }
    let dirty: Vec<_> = dirty.iter().map(|id| &locked[id]).collect();
    if !dirty.is_empty() {
        charges::save(conn, &dirty).await?;
    }
    if !made.is_empty() {
        let rows: Vec<refunds::Keyed<'_>> = made
            .iter()
            .map(|(i, refund)| {
                let change = changes[*i];
                (&change.scope, change.keyed, change.fingerprint, refund)
            })
            .collect();
        refunds::insert(conn, &rows).await?;
    }
    Ok(performed)
}

/// Settles the refunds among the claimed that were made at an earlier time, and
/// gives the others.
async fn settle_old(
    conn: &mut PgConnection,
    changes: &[&ChangeCharge],
    claimed: Vec<usize>,
    answers: &mut Vec<(usize, Arc<KeyRecord>)>,
) -> Result<Vec<usize>, sqlx::Error> {
    let mut fresh = Vec::new();
    for (i, refund) in claimed
        .iter()
        .zip(earlier_refunds(conn, changes, &claimed).await?)
    {
        match refund {
            Some(refund) => answers.push((*i, refund)),
            None => fresh.push(*i),
        }
    }
    Ok(fresh)
}

/// Settles what was refused, and what has no charge: by what the key has made at an
/// earlier time, if it has, else by the refusal. Gives those whose charge is missing.
async fn settle_refused(
    conn: &mut PgConnection,
    changes: &[&ChangeCharge],
    refused: Vec<(usize, Arc<KeyRecord>)>,
    missing: Vec<usize>,
    answers: &mut Vec<(usize, Arc<KeyRecord>)>,
) -> Result<Vec<usize>, sqlx::Error> {
    let positions: Vec<usize> = refused.iter().map(|(i, _)| *i).chain(missing).collect();
    if positions.is_empty() {
        return Ok(vec![]);
    }
    let earlier = earlier_refunds(conn, changes, &positions).await?;
    let also_earlier = earlier_charges(conn, changes, &positions).await?;
    let mut missing = Vec::new();
    let mut refusals = refused.into_iter().map(|(_, refusal)| refusal);
    for ((i, refund), charge) in positions.into_iter().zip(earlier).zip(also_earlier) {
        // The refusals come first, in their order.
        let refusal = refusals.next();
        match refund.or(charge).or(refusal) {
            Some(answer) => answers.push((i, answer)),
            None => missing.push(i),
        }
    }
    Ok(missing)
}

/// The refunds that were made under these changes' keys.
async fn earlier_refunds(
    conn: &mut PgConnection,
    changes: &[&ChangeCharge],
    positions: &[usize],
) -> Result<Vec<Option<Arc<KeyRecord>>>, sqlx::Error> {
    let scopes: Vec<&Scope> = positions.iter().map(|&i| &changes[i].scope).collect();
    let found = refunds::by_key(conn, &scopes).await?.into_iter();
    Ok(found
        .map(|found| {
            let (fingerprint, refund) = found?;
            Some(Arc::new(KeyRecord {
                fingerprint,
                digests: None,
                operation_id: refund.id.0,
                request_id: refund.request_id,
                answer: refund.answer(),
                duplicate_of: None,
            }))
        })
        .collect())
}

/// The charges that were made under these changes' keys: then the key belongs to
/// another request.
async fn earlier_charges(
    conn: &mut PgConnection,
    changes: &[&ChangeCharge],
    positions: &[usize],
) -> Result<Vec<Option<Arc<KeyRecord>>>, sqlx::Error> {
    let scopes: Vec<&Scope> = positions.iter().map(|&i| &changes[i].scope).collect();
    let found = charges::by_key(conn, &scopes).await?.into_iter();
    Ok(found
        .map(|found| {
            let (fingerprint, charge) = found?;
            Some(Arc::new(KeyRecord {
                fingerprint,
                digests: None,
                operation_id: charge.id.0,
                request_id: charge.request_id,
                answer: charge.answer(),
                duplicate_of: None,
            }))
        })
        .collect())
}

fn own(change: &ChangeCharge, answer: Answer) -> Arc<KeyRecord> {
    Arc::new(KeyRecord {
        fingerprint: change.fingerprint,
        digests: Some(change.digests.as_bytes().to_vec()),
        operation_id: change.operation_id,
        request_id: change.request_id,
        answer,
        duplicate_of: None,
    })
}
