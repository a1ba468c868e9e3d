//! Takes batches from the queue and sees each through, whatever comes.

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use sqlx::PgConnection;
use tokio::{
    sync::{Mutex, mpsc},
    time::{Instant, timeout},
};
use tracing::{debug, error, warn};

use super::{Command, Job, KeyRecord, Options, Resolution, change};
use crate::{
    charges::{self, CreateCharge, CreateClaim, FindsAnother},
    db::{
        self, ErrorClass, Session, backoff, describe,
        replication::{self, Configuration, Replication, WrittenBy},
    },
    error::{Error, Unavailable},
    idempotency::{
        self, Answer, Conflict, KeyClaim, Scope,
        store::{self, KeyRow, NewRow},
    },
    ids::ChargeId,
};

/// How long one attempt at a batch may take. More than the server's
/// `statement_timeout`, so that a slow statement is told from a dead connection,
/// and short enough for a second attempt within a request's deadline.
pub(crate) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(4);

/// A batch takes no more commands once those it has come to so many bytes: two
/// hundred times what a usual charge needs, and a quarter of a second on a slow
/// network (4 MB/s). A number of commands alone bounds nothing: 256 with 50 kB each
/// would take longer than an attempt may, again and again.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// What an attempt found out about one command.
#[derive(Debug)]
pub(super) enum AttemptOutcome {
    /// Its key's row, as this transaction wrote it.
    Row(Arc<KeyRecord>),
    /// Its key's row, as another transaction wrote it, and which one where there are
    /// synchronous standbys.
    Known(Arc<KeyRecord>, Option<WrittenBy>),
    /// Another transaction holds its key, or its guard.
    Held,
    /// Nothing was done, and its key is free, for this reason.
    Undone(Error),
}

impl AttemptOutcome {
    /// What this transaction has made.
    fn own(command: &CreateCharge, duplicate_of: Option<ChargeId>) -> Self {
        Self::Row(Arc::new(KeyRecord {
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
            .ok_or_else(|| db::corrupt_column("response_status"))?;
        let settled = KeyRecord {
            fingerprint: row.fingerprint,
            digests: row.digests,
            operation_id: row.operation_id,
            request_id: row.request_id,
            duplicate_of: charges::duplicate_of(&answer),
            answer,
        };
        Ok(Self::Known(Arc::new(settled), row.written_by))
    }

    /// Who wrote what was read, if a standby is not known to have it.
    fn unconfirmed(&self, replication: &Replication) -> Option<&WrittenBy> {
        match self {
            Self::Known(_, Some(by)) if !replication.has(by) => Some(by),
            _ => None,
        }
    }

    /// Tells all that wait for the key, or goes back to the queue.
    fn conclude(self, job: Job) {
        match self {
            Self::Row(row) | Self::Known(row, _) => job.conclude(&Resolution::Row(row)),
            Self::Undone(why) => job.conclude(&Resolution::Undone(why)),
            Self::Held => requeue(job),
        }
    }
}

/// One writing task: a connection, and the batches that go over it.
struct Task {
    options: Arc<Options>,
    replication: Arc<Replication>,
    /// Opened when it is needed, and dropped after whatever makes it doubtful.
    session: Option<Session>,
}

/// Why an attempt came to nothing. On the server it may have been committed all the same,
/// unless it was stalled or the database said otherwise.
enum Failure {
    /// Nothing can be committed now: COMMITs wait for a standby.
    Stalled,
    /// Our own time-out struck before COMMIT was sent.
    Late,
    /// An error; after COMMIT was sent our own time-out is one, of I/O.
    Error(sqlx::Error),
}

/// Takes batches, forever.
pub(super) async fn run(
    jobs: Arc<Mutex<mpsc::UnboundedReceiver<Job>>>,
    options: Arc<Options>,
    replication: Arc<Replication>,
) {
    let mut task = Task {
        options,
        replication,
        session: None,
    };
    loop {
        // Held while waiting, so that the tasks take turns and one gets all
        // that is there.
        let batch = next_batch(&mut *jobs.lock().await, task.options.batch_max).await;
        if batch.is_empty() {
            return;
        }
        task.process_batch(batch).await;
    }
}

/// All that wait, within the bounds of a batch; nothing if nobody can ask any more.
async fn next_batch(jobs: &mut mpsc::UnboundedReceiver<Job>, count_max: usize) -> Vec<Job> {
    let mut batch = Vec::new();
    batch.extend(jobs.recv().await);
    let mut bytes: usize = batch.iter().map(|job| job.command.bytes()).sum();
    while batch.len() < count_max
        && bytes < BATCH_BYTES_MAX
        && let Ok(job) = jobs.try_recv()
    {
        bytes += job.command.bytes();
        batch.push(job);
    }
    batch
}

impl Task {
    /// Has every job of the batch concluded or back in the queue.
    async fn process_batch(&mut self, batch: Vec<Job>) {
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            if let Some((first, second)) = self.run_until_settled(part).await {
                // The first half is tried first: it has waited longest.
                parts.extend([second, first]);
            }
        }
    }

    /// Has every job concluded or back in the queue, or gives the halves to try
    /// apart.
    async fn run_until_settled(&mut self, mut part: Vec<Job>) -> Option<(Vec<Job>, Vec<Job>)> {
        let mut pauses = backoff();
        let mut check_purged_refunds = false;
        loop {
            part = expire_overdue(part);
            if part.is_empty() {
                return None;
            }
            if self.replication.is_stalled() {
                self.answer_known(part).await;
                return None;
            }
            let error = match self.attempt(&mut part, check_purged_refunds).await {
                Ok(found) => {
                    for (job, found) in part.into_iter().zip(found) {
                        found.conclude(job);
                    }
                    return None;
                }
                Err(Failure::Stalled) => continue,
                Err(Failure::Late) => {
                    warn!(batch_len = part.len(), "a batch took too long");
                    if part.len() > 1 {
                        return Some(halves(part));
                    }
                    continue;
                }
                Err(Failure::Error(error))
                    if !check_purged_refunds && change::met_an_old_refund(&error) =>
                {
                    check_purged_refunds = true;
                    continue;
                }
                Err(Failure::Error(error)) => error,
            };
            let class = ErrorClass::of(&error);
            warn!(error = %describe(&error), ?class, batch_len = part.len(), "a batch failed");
            match class {
                ErrorClass::Transient | ErrorClass::TableLocked => {
                    tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                }
                ErrorClass::RowLocked | ErrorClass::TimedOut | ErrorClass::Rejected
                    if part.len() > 1 =>
                {
                    return Some(halves(part));
                }
                ErrorClass::RowLocked => {
                    part.into_iter().for_each(requeue);
                    return None;
                }
                ErrorClass::ResourceExhausted
                | ErrorClass::Misconfigured
                | ErrorClass::TimedOut => {
                    conclude_all(part, &Resolution::Unavailable(Unavailable::Database));
                    return None;
                }
                ErrorClass::Rejected => {
                    for job in part {
                        error!(
                            error = %describe(&error),
                            account_id = %job.command.scope().account_id,
                            charge_id = %job.command.charge_id(),
                            "the database refuses a command"
                        );
                        job.conclude(&Resolution::Internal);
                    }
                    return None;
                }
            }
        }
    }

    /// Connects, and notes what the server says of its standbys.
    async fn connect(&self) -> Result<Session, sqlx::Error> {
        let session = self.options.server.connect().await?;
        self.replication.set_stalled(session.stalled);
        Ok(session)
    }

    /// One transaction for all. What comes back is committed.
    async fn attempt(
        &mut self,
        part: &mut [Job],
        check_purged_refunds: bool,
    ) -> Result<Vec<AttemptOutcome>, Failure> {
        let commands: Vec<&Command> = part.iter().map(|job| &*job.command).collect();
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.connect().await.map_err(Failure::Error)?,
        };
        if self.replication.is_stalled() {
            self.session = Some(session);
            return Err(Failure::Stalled);
        }
        let mut committing = false;
        let ended = timeout(ATTEMPT_TIMEOUT, async {
            let conn = &mut session.conn;
            let mut transaction = self.options.server.begin(conn).await?;
            let found = write(&mut transaction, &commands, check_purged_refunds).await?;
            let unconfirmed = found
                .iter()
                .filter_map(|found| found.unconfirmed(&self.replication))
                .min_by_key(|by| by.horizon)
                .cloned();
            let mut before = None;
            if unconfirmed.is_some() {
                before = Some(Configuration::of(&mut transaction).await?);
                replication::leave_record(&mut transaction).await?;
            }
            committing = true;
            if replication::warned(transaction.commit()).await? {
                replication::wait_for_standby(conn).await?;
            }
            if let (Some(by), Some(before)) = (unconfirmed, before)
                && by.standbys == before.standbys
                && before == Configuration::of(conn).await?
            {
                self.replication.confirm(by.standbys, by.horizon);
            }
            Ok(found)
        })
        .await;
        debug!(
            batch_len = part.len(),
            ok = matches!(ended, Ok(Ok(_))),
            "batch"
        );
        let failure = match ended {
            Ok(Ok(found)) => {
                self.session = Some(session);
                return Ok(found);
            }
            Ok(Err(error)) => Failure::Error(error),
            Err(_) if committing => {
                let late = std::io::ErrorKind::TimedOut;
                Failure::Error(sqlx::Error::Io(late.into()))
            }
            Err(_) => Failure::Late,
        };
        match &failure {
            Failure::Error(error) if error.as_database_error().is_some() => {
                match ErrorClass::of(error) {
                    // The session may be a part of what is wrong.
                    ErrorClass::Transient
                    | ErrorClass::ResourceExhausted
                    | ErrorClass::Misconfigured => {}
                    ErrorClass::Rejected if part.len() == 1 => {}
                    _ => self.session = Some(session),
                }
            }
            // Cut off in the middle: the transaction may still be open on the server, and
            // it may be our own work that holds the keys now.
            _ => {
                for job in part {
                    job.wait_until = job.deadline;
                }
            }
        }
        Err(failure)
    }

    /// While COMMITs wait for a standby: answers the keys whose rows a standby is known
    /// to have, which takes no COMMIT that waits. All others come back in a moment, and
    /// are given up at their deadline.
    async fn answer_known(&mut self, part: Vec<Job>) {
        let known = self.look_up(&part).await.unwrap_or_else(|error| {
            warn!(error = %describe(&error), batch_len = part.len(), "a look-up of keys failed");
            vec![None; part.len()]
        });
        for (job, known) in part.into_iter().zip(known) {
            // Keys that are known need room in the queue as well.
            let room = job.shared.room.available_permits();
            let crowded = room < self.options.queue_max as usize / 2;
            let pause = Duration::from_millis(rand::rng().random_range(100..=200));
            if let Some(row) = known {
                job.conclude(&Resolution::Row(row));
            } else if !self.replication.is_stalled() {
                job.enqueue();
            } else if !crowded && Instant::now() + pause < job.deadline {
                job.enqueue_after(pause);
            } else {
                job.conclude(&Resolution::Unavailable(Unavailable::StandbyAway));
            }
        }
    }

    /// The rows of these jobs' keys that are durable already. Notes as well whether
    /// COMMITs still wait.
    async fn look_up(&mut self, part: &[Job]) -> Result<Vec<Option<Arc<KeyRecord>>>, sqlx::Error> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.connect().await?,
        };
        let scopes: Vec<_> = part.iter().map(|job| job.command.scope()).collect();
        let (stalled, rows) = db::within(ATTEMPT_TIMEOUT, async {
            let mut transaction = self.options.server.begin(&mut session.conn).await?;
            let stalled = replication::stalled(&mut transaction).await?;
            let rows = store::read(&mut transaction, &scopes).await?;
            transaction.commit().await?;
            Ok::<_, sqlx::Error>((stalled, rows))
        })
        .await?;
        self.replication.set_stalled(stalled);
        self.session = Some(session);
        let answered = |row: KeyRow| {
            let found = AttemptOutcome::row(row).ok()?;
            match found {
                AttemptOutcome::Known(row, by)
                    if by.as_ref().is_none_or(|by| self.replication.has(by)) =>
                {
                    Some(row)
                }
                _ => None,
            }
        };
        Ok(rows
            .into_iter()
            .map(|row| row.filter(|row| !row.expired).and_then(answered))
            .collect())
    }
}

fn halves(mut part: Vec<Job>) -> (Vec<Job>, Vec<Job>) {
    let second = part.split_off(part.len() / 2);
    (part, second)
}

fn conclude_all(part: Vec<Job>, verdict: &Resolution) {
    for job in part {
        job.conclude(verdict);
    }
}

/// Concludes the jobs whose time is up.
fn expire_overdue(part: Vec<Job>) -> Vec<Job> {
    let now = Instant::now();
    let (late, rest): (Vec<_>, Vec<_>) = part.into_iter().partition(|job| job.deadline <= now);
    conclude_all(late, &Resolution::Unavailable(Unavailable::Database));
    rest
}

/// Another transaction is at the key: asks again in a moment, until the wait
/// has passed.
fn requeue(job: Job) {
    let pause = Duration::from_millis(rand::rng().random_range(10..=25));
    if Instant::now() + pause < job.wait_until {
        job.enqueue_after(pause);
    } else {
        job.conclude(&Resolution::InUse);
    }
}

/// The statements between `begin` and `commit`: those of new charges, then those
/// of changes. One kind costs nothing where there is none of it.
async fn write(
    conn: &mut PgConnection,
    commands: &[&Command],
    check_purged_refunds: bool,
) -> Result<Vec<AttemptOutcome>, sqlx::Error> {
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
    let mut found: Vec<AttemptOutcome> = commands.iter().map(|_| AttemptOutcome::Held).collect();
    if !creations.is_empty() {
        for (i, what) in of_creations
            .into_iter()
            .zip(create(conn, &creations).await?)
        {
            found[i] = what;
        }
    }
    if !changes.is_empty() {
        let done = change::write(conn, &changes, check_purged_refunds).await?;
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
) -> Result<Vec<AttemptOutcome>, sqlx::Error> {
    let mut claims = charges::claim_and_insert(conn, commands).await?;
    let mut found: Vec<AttemptOutcome> = commands.iter().map(|_| AttemptOutcome::Held).collect();

    let taken = positions(&claims, Option::is_none);
    if !taken.is_empty() {
        let mut freed = Vec::new();
        let why = idempotency::resolve_conflicts(conn, &scopes(commands, &taken)).await?;
        for (&i, why) in taken.iter().zip(why) {
            match why {
                Conflict::Answered(row) => found[i] = AttemptOutcome::row(row)?,
                Conflict::Freed => freed.push(i),
                Conflict::InUse => {}
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

    let charged = positions(&claims, |claim| *claim == Some(CreateClaim::Charged));
    for &i in &charged {
        found[i] = AttemptOutcome::own(commands[i], None);
    }
    claim_duplicate_guards(conn, commands, &charged, &mut found).await?;

    let mut existing = positions(&claims, |claim| *claim == Some(CreateClaim::ChargeExists));
    // Without a key it can only have met itself: its COMMIT was lost, and its key
    // has expired since.
    for i in existing.extract_if(.., |i| !commands[*i].keyed) {
        found[i] = AttemptOutcome::own(commands[i], None);
    }
    if !existing.is_empty() {
        let commands: Vec<&CreateCharge> = existing.iter().map(|&i| commands[i]).collect();
        let rows = answer_from_charges(conn, &commands).await?;
        for (i, row) in existing.into_iter().zip(rows) {
            found[i] = AttemptOutcome::Row(Arc::new(row));
        }
    }
    Ok(found)
}

/// Has the charges that were just made hold their guards, and takes those back
/// that must not be made beside another one.
async fn claim_duplicate_guards(
    conn: &mut PgConnection,
    commands: &[&CreateCharge],
    charged: &[usize],
    found: &mut [AttemptOutcome],
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
            (KeyClaim::Claimed, _) | (_, FindsAnother::Allowed) => continue,
            (KeyClaim::Answered(row), FindsAnother::Warned) => {
                let original = ChargeId(row.operation_id);
                warned.push((commands[i], commands[i].answer_beside(original)));
                AttemptOutcome::own(commands[i], Some(original))
            }
            (KeyClaim::Answered(row), FindsAnother::Refused) => {
                withdrawn.push(commands[i]);
                AttemptOutcome::Undone(Error::DuplicateCharge(ChargeId(row.operation_id)))
            }
            // Another transaction makes such a charge now, or fails to.
            (KeyClaim::InUse, _) => {
                withdrawn.push(commands[i]);
                AttemptOutcome::Held
            }
        };
    }
    if !withdrawn.is_empty() {
        charges::undo_create(conn, &withdrawn).await?;
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
) -> Result<Vec<KeyRecord>, sqlx::Error> {
    let scopes: Vec<_> = commands.iter().map(|command| &command.scope).collect();
    let charges = charges::by_key(conn, &scopes).await?;
    let mut settled = Vec::with_capacity(commands.len());
    for charge in charges {
        // The claim met it a moment ago, and charges are never deleted.
        let (fingerprint, charge) = charge.ok_or(sqlx::Error::RowNotFound)?;
        settled.push(KeyRecord {
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
