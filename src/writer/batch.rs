//! Takes batches from the queue and sees each through, whatever comes.

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use sqlx::PgConnection;
use tokio::{
    sync::{Mutex, mpsc},
    time::Instant,
};
use tracing::{debug, error, warn};

use super::{Command, Job, Options, Settled, Verdict, change};
use crate::{
    charges::{self, Claimed, CreateCharge, FindsAnother},
    db::{self, Trouble, backoff, describe},
    error::Error,
    idempotency::{
        self, Answer, Scope, Taken,
        store::{self, KeyRow, NewRow},
    },
    ids::ChargeId,
};

/// How long one attempt at a batch may take. More than the server's
/// `statement_timeout`, so that a slow statement is told from a dead connection,
/// and short enough for a second attempt within a request's deadline.
pub(crate) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(4);

/// What an attempt found out about one command.
pub(super) enum Found {
    /// Its key's row.
    Row(Arc<Settled>),
    /// Another transaction holds its key, or its guard.
    Held,
    /// Nothing was done, and its key is free, for this reason.
    Undone(Error),
}

impl Found {
    /// What this transaction has made.
    fn own(command: &CreateCharge, duplicate_of: Option<ChargeId>) -> Self {
        Self::Row(Arc::new(Settled {
            fingerprint: command.fingerprint,
            digests: Some(command.digests.as_bytes().to_vec()),
            operation_id: command.charge.id.0,
            request_id: command.charge.request_id,
            answer: command.answer.clone(),
            duplicate_of,
        }))
    }

    /// What was there.
    pub(super) fn row(row: KeyRow) -> Result<Self, sqlx::Error> {
        let answer = row
            .answer
            .ok_or_else(|| db::unreadable("response_status"))?;
        Ok(Self::Row(Arc::new(Settled {
            fingerprint: row.fingerprint,
            digests: row.digests,
            operation_id: row.operation_id,
            request_id: row.request_id,
            duplicate_of: charges::duplicate_of(&answer),
            answer,
        })))
    }
}

/// One writing task: a connection, and the batches that go over it.
struct Task {
    options: Arc<Options>,
    /// Opened when it is needed, and dropped after whatever makes it doubtful.
    conn: Option<PgConnection>,
}

/// Takes batches, forever.
pub(super) async fn run(jobs: Arc<Mutex<mpsc::UnboundedReceiver<Job>>>, options: Arc<Options>) {
    let mut task = Task {
        conn: None,
        options,
    };
    loop {
        let mut batch = Vec::new();
        // Held while waiting, so that the tasks take turns and one gets all
        // that is there.
        if jobs
            .lock()
            .await
            .recv_many(&mut batch, task.options.batch_max)
            .await
            == 0
        {
            return;
        }
        task.see_through(batch).await;
    }
}

impl Task {
    /// Has every job of the batch concluded or back in the queue.
    async fn see_through(&mut self, batch: Vec<Job>) {
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            if let Some((first, second)) = self.see_part_through(part).await {
                // The first half is tried first: it has waited longest.
                parts.extend([second, first]);
            }
        }
    }

    /// Has every job concluded or back in the queue, or gives the halves to try
    /// apart.
    async fn see_part_through(&mut self, mut part: Vec<Job>) -> Option<(Vec<Job>, Vec<Job>)> {
        let mut pauses = backoff();
        let mut careful = false;
        loop {
            part = give_up_late(part);
            if part.is_empty() {
                return None;
            }
            let error = match self.attempt(&mut part, careful).await {
                Ok(found) => {
                    for (job, found) in part.into_iter().zip(found) {
                        match found {
                            Found::Row(row) => job.conclude(&Verdict::Row(row)),
                            Found::Undone(why) => job.conclude(&Verdict::Undone(why)),
                            Found::Held => come_back_later(job),
                        }
                    }
                    return None;
                }
                Err(error) if !careful && change::met_an_old_refund(&error) => {
                    careful = true;
                    continue;
                }
                Err(error) => error,
            };
            let trouble = Trouble::of(&error);
            warn!(error = %describe(&error), ?trouble, batch_len = part.len(), "a batch failed");
            match trouble {
                Trouble::Passing | Trouble::TableLocked => {
                    tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                }
                Trouble::RowLocked | Trouble::TimedOut | Trouble::Refused if part.len() > 1 => {
                    let second = part.split_off(part.len() / 2);
                    return Some((part, second));
                }
                Trouble::RowLocked => {
                    part.into_iter().for_each(come_back_later);
                    return None;
                }
                Trouble::Exhausted | Trouble::Misconfigured | Trouble::TimedOut => {
                    conclude_all(part, &Verdict::Unavailable);
                    return None;
                }
                Trouble::Refused => {
                    for job in part {
                        error!(
                            error = %describe(&error),
                            account_id = %job.command.scope().account_id,
                            charge_id = %job.command.charge_id(),
                            "the database refuses a command"
                        );
                        job.conclude(&Verdict::Internal);
                    }
                    return None;
                }
            }
        }
    }

    /// One transaction for all. What comes back is committed.
    ///
    /// On an error nothing of it is kept here; on the server it may have been
    /// committed if the error came from the connection.
    async fn attempt(
        &mut self,
        part: &mut [Job],
        careful: bool,
    ) -> Result<Vec<Found>, sqlx::Error> {
        let commands: Vec<&Command> = part.iter().map(|job| &*job.command).collect();
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.options.server.connect().await?,
        };
        let result: Result<_, sqlx::Error> = db::within(ATTEMPT_TIMEOUT, async {
            let mut transaction = self.options.server.begin(&mut conn).await?;
            let found = write(&mut transaction, &commands, careful).await?;
            transaction.commit().await?;
            Ok(found)
        })
        .await;
        debug!(batch_len = part.len(), ok = result.is_ok(), "batch");
        match &result {
            // Cut off in the middle: the transaction may still be open on the
            // server, and it may be our own work that holds the keys now.
            Err(error) if error.as_database_error().is_none() => {
                for job in part {
                    job.wait_until = job.deadline;
                }
            }
            Err(error) => match Trouble::of(error) {
                // The session may be a part of what is wrong.
                Trouble::Passing | Trouble::Exhausted | Trouble::Misconfigured => {}
                Trouble::Refused if part.len() == 1 => {}
                _ => self.conn = Some(conn),
            },
            Ok(_) => self.conn = Some(conn),
        }
        result
    }
}

fn conclude_all(part: Vec<Job>, verdict: &Verdict) {
    for job in part {
        job.conclude(verdict);
    }
}

/// Concludes the jobs whose time is up.
fn give_up_late(part: Vec<Job>) -> Vec<Job> {
    let now = Instant::now();
    let (late, rest): (Vec<_>, Vec<_>) = part.into_iter().partition(|job| job.deadline <= now);
    conclude_all(late, &Verdict::Unavailable);
    rest
}

/// Another transaction is at the key: asks again in a moment, until the wait
/// has passed.
fn come_back_later(job: Job) {
    let pause = Duration::from_millis(rand::rng().random_range(10..=25));
    if Instant::now() + pause < job.wait_until {
        job.enqueue_after(pause);
    } else {
        job.conclude(&Verdict::InUse);
    }
}

/// The statements between `begin` and `commit`: those of new charges, then those
/// of changes. One kind costs nothing where there is none of it.
async fn write(
    conn: &mut PgConnection,
    commands: &[&Command],
    careful: bool,
) -> Result<Vec<Found>, sqlx::Error> {
    let (mut creations, mut of_creations) = (Vec::new(), Vec::new());
    let (mut changes, mut of_changes) = (Vec::new(), Vec::new());
    for (i, command) in commands.iter().enumerate() {
        match command {
            Command::CreateCharge(command) => {
                creations.push(&**command);
                of_creations.push(i);
            }
            Command::ChangeCharge(command) => {
                changes.push(&**command);
                of_changes.push(i);
            }
        }
    }
    let mut found: Vec<Found> = commands.iter().map(|_| Found::Held).collect();
    if !creations.is_empty() {
        for (i, what) in of_creations
            .into_iter()
            .zip(create(conn, &creations).await?)
        {
            found[i] = what;
        }
    }
    if !changes.is_empty() {
        let done = change::write(conn, &changes, careful).await?;
        for (i, what) in of_changes.into_iter().zip(done) {
            found[i] = what;
        }
    }
    Ok(found)
}

/// Creates charges; the table of round trips in the module's doc is this function.
async fn create(
    conn: &mut PgConnection,
    commands: &[&CreateCharge],
) -> Result<Vec<Found>, sqlx::Error> {
    let mut claims = charges::claim_and_insert(conn, commands).await?;
    let mut found: Vec<Found> = commands.iter().map(|_| Found::Held).collect();

    let taken = positions(&claims, Option::is_none);
    if !taken.is_empty() {
        let mut freed = Vec::new();
        let why = idempotency::why_taken(conn, &scopes(commands, &taken)).await?;
        for (&i, why) in taken.iter().zip(why) {
            match why {
                Taken::Answered(row) => found[i] = Found::row(row)?,
                Taken::Freed => freed.push(i),
                Taken::InUse => {}
            }
        }
        if !freed.is_empty() {
            let again: Vec<&CreateCharge> = freed.iter().map(|&i| commands[i]).collect();
            let claimed = charges::claim_and_insert(conn, &again).await?;
            for (i, claim) in freed.into_iter().zip(claimed) {
                claims[i] = claim;
            }
        }
    }

    let charged = positions(&claims, |claim| *claim == Some(Claimed::Charged));
    for &i in &charged {
        found[i] = Found::own(commands[i], None);
    }
    stand_guard(conn, commands, &charged, &mut found).await?;

    let mut existing = positions(&claims, |claim| *claim == Some(Claimed::ChargeExists));
    // Without a key it can only have met itself: its COMMIT was lost, and its key
    // has expired since.
    for i in existing.extract_if(.., |i| !commands[*i].keyed) {
        found[i] = Found::own(commands[i], None);
    }
    if !existing.is_empty() {
        let commands: Vec<&CreateCharge> = existing.iter().map(|&i| commands[i]).collect();
        let rows = answer_from_charges(conn, &commands).await?;
        for (i, row) in existing.into_iter().zip(rows) {
            found[i] = Found::Row(Arc::new(row));
        }
    }
    Ok(found)
}

/// Has the charges that were just made hold their guards, and takes those back
/// that must not be made beside another one.
async fn stand_guard(
    conn: &mut PgConnection,
    commands: &[&CreateCharge],
    charged: &[usize],
    found: &mut [Found],
) -> Result<(), sqlx::Error> {
    let nothing = Answer {
        status: 200,
        head: None,
        body: "null".into(),
    };
    let guarded: Vec<_> = charged
        .iter()
        .filter_map(|&i| Some((i, commands[i].guard.as_ref()?)))
        .collect();
    if guarded.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = guarded
        .iter()
        .map(|&(i, guard)| commands[i].guard_row(guard, &nothing))
        .collect();
    let claims = idempotency::claim(conn, &rows).await?;
    let (mut withdrawn, mut warned) = (Vec::new(), Vec::new());
    for ((i, guard), claim) in guarded.into_iter().zip(claims) {
        found[i] = match (claim, guard.finds_another) {
            (idempotency::Claimed::Claimed, _) | (_, FindsAnother::Allowed) => continue,
            (idempotency::Claimed::Answered(row), FindsAnother::Warned) => {
                let original = ChargeId(row.operation_id);
                warned.push((commands[i], commands[i].answer_beside(original)));
                Found::own(commands[i], Some(original))
            }
            (idempotency::Claimed::Answered(row), FindsAnother::Refused) => {
                withdrawn.push(commands[i]);
                Found::Undone(Error::DuplicateCharge(ChargeId(row.operation_id)))
            }
            // Another transaction makes such a charge now, or fails to.
            (idempotency::Claimed::InUse, _) => {
                withdrawn.push(commands[i]);
                Found::Held
            }
        };
    }
    if !withdrawn.is_empty() {
        charges::withdraw(conn, &withdrawn).await?;
    }
    // With the claim's own transaction, so that no replay is without it.
    let rows: Vec<_> = warned
        .iter()
        .map(|(command, answer)| NewRow {
            answer: Some(answer),
            ..command.row()
        })
        .collect();
    if !rows.is_empty() {
        store::answer(conn, &rows).await?;
    }
    Ok(())
}

/// Makes the rows of these commands' keys, which this transaction claimed, say
/// what the charges say that carry the keys already.
async fn answer_from_charges(
    conn: &mut PgConnection,
    commands: &[&CreateCharge],
) -> Result<Vec<Settled>, sqlx::Error> {
    let scopes: Vec<_> = commands.iter().map(|command| &command.scope).collect();
    let charges = charges::by_key(conn, &scopes).await?;
    let mut settled = Vec::with_capacity(commands.len());
    for charge in charges {
        // The claim met it a moment ago, and charges are never deleted.
        let (fingerprint, charge) = charge.ok_or(sqlx::Error::RowNotFound)?;
        settled.push(Settled {
            fingerprint,
            digests: None,
            operation_id: charge.id.0,
            request_id: charge.request_id,
            answer: charge.answer(),
            duplicate_of: None,
        });
    }
    let rows: Vec<_> = commands
        .iter()
        .zip(&settled)
        .map(|(command, row)| NewRow {
            fingerprint: row.fingerprint,
            digests: None,
            operation_id: row.operation_id,
            request_id: row.request_id,
            answer: Some(&row.answer),
            ..command.row()
        })
        .collect();
    store::answer(conn, &rows).await?;
    Ok(settled)
}

fn positions<T>(items: &[T], matches: impl Fn(&T) -> bool) -> Vec<usize> {
    items
        .iter()
        .enumerate()
        .filter(|(_, item)| matches(item))
        .map(|(i, _)| i)
        .collect()
}

fn scopes<'a>(commands: &[&'a CreateCharge], positions: &[usize]) -> Vec<&'a Scope> {
    positions.iter().map(|&i| &commands[i].scope).collect()
}
