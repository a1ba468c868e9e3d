//! The writer: everything that changes something goes through here, many
//! commands to a transaction (group commit).
//!
//! Commands gather in a queue. A writing task takes all that wait (at most
//! `batch_max`), runs them in one transaction, and answers each after COMMIT.
//! Two tasks take turns, so that one prepares while the other's commit is being
//! flushed. There is no timer: a quiet service has batches of one, a busy one
//! large batches.
//!
//! # Round trips of a batch
//!
//! | trip | statement | when |
//! | --- | --- | --- |
//! | 1 | `begin` | always |
//! | 2 | claim the keys and insert the charges (`charges::claim_and_insert`) | always |
//! | 3 | read the rows of keys that were not claimed (`store::read`) | a key was not free |
//! | 4 | free keys whose answers have expired (`store::free_expired`) | such a row was read |
//! | 5 | claim and insert again, for those | one was freed |
//! | 6 | claim the guards of new charges (`idempotency::claim`) | the duplicate guard is on |
//! | 7 to 10 | the same for guards as 3 to 5 for keys, and read once more | a guard was not free |
//! | 11, 12 | take charges back that their guards refuse (`charges::undo_create`) | likewise |
//! | 13 | store which charge the guard warned of (`store::answer`) | likewise |
//! | 14 | read the charges that carry a claimed key already (`charges::by_key`) | a claim met one |
//! | 15 | put the answers of those charges in their rows (`store::answer`) | likewise |
//! | 16 | leave a WAL record (`replication::leave_record`) | a row of somebody else's is answered from, and no synchronous standby is known to have it |
//! | 17 | `commit` | always |
//!
//! Changes of charges (captures, refunds, updates) go the general way, between
//! the same `begin` and `commit`: claim the keys; lock the charges; save them;
//! insert refunds; store the answers. Six trips for a batch of captures, seven
//! with refunds; one more where a charge is missing or locked, and two where a change
//! is refused or its charge is missing: its key may have made something long ago.
//!
//! A batch takes no more commands once it has come to a mebibyte.
//!
//! Fresh charges take three trips (four with the guard), replays four, whatever
//! the size of the batch. Nothing else happens while the transaction is open.
//!
//! # What if the process dies
//!
//! | when | what is there afterwards | what a retry gets |
//! | --- | --- | --- |
//! | before `begin`, or anywhere before `commit` | nothing: the server rolls back when it sees the connection gone, within 5 s also if the machine vanished | it is the first request |
//! | after `commit` was sent, before it was done | nothing, or everything | the first answer, made now or then |
//! | after `commit`, before the client was answered | key, answer and charge | the replay |
//! | after the client was answered | the same | the replay |
//!
//! What the duplicate guard warned of is written to the key's row in the charge's
//! own transaction, so it is there whenever the answer is: a process that dies
//! between the two statements leaves neither, and a batch whose COMMIT was lost finds
//! both in the row.
//!
//! # What if two replicas do it at once
//!
//! Both try to claim; the primary key of `idempotency_keys` lets one through.
//! The other sees either the committed row (replay or 422) or no row while the
//! first one's transaction is open; then the command goes back to the queue for
//! 10 to 25 ms, until its wait has passed (409).
//!
//! # What if the answer to COMMIT is lost
//!
//! The batch runs again on a new connection. What had been committed is found
//! as a row that carries the command's own charge id, and is a first answer;
//! what had not is claimed anew under the same charge id. The old connection's
//! transaction may still be open on the server meanwhile: its keys are waited
//! for until the command's deadline, since it may be our own work. The same
//! holds wherever the connection breaks after `begin`.
//!
//! # What if a COMMIT waits for a synchronous standby
//!
//! Its rows are not seen and its jobs are not answered until the standby has them
//! ([`replication`](crate::db::replication) says why an answer from somebody else's
//! rows waits as well). An attempt whose COMMIT has not come back in time is given up,
//! and its backend goes on waiting on the server. Each new connection looks first
//! whether COMMITs wait there (`pg_stat_activity`): if so, this process commits nothing
//! until they do not. Keys whose rows a standby has are answered from a look-up,
//! everything else goes round the queue and gets 503 at its deadline. So at most one
//! backend per writing task waits, however long the standby is away. It is not asked
//! to end either: its rows would become visible, and no standby would have them.
//!
//! | when the process dies | what is there afterwards |
//! | --- | --- |
//! | while its COMMIT waits | the server goes on waiting, and holds the key: retries on other replicas wait, too, then get 409 or 503. When the standby is back the retry is replayed; if the primary is lost, the standby has nothing and the retry is the first request |
//! | after the wait, before it was answered | on both servers the same: the replay |
//!
//! # What is done after which fault
//!
//! | [`ErrorClass`] | what is done |
//! | --- | --- |
//! | our own time-out, before COMMIT was sent | the batch is halved and run again, on a new connection: what it carries may be too much for the network |
//! | our own time-out after it, and no standby is waited for | as `Transient` |
//! | `Transient` | the same batch again, on a new connection, with backoff, until the deadline; then 503 |
//! | `TableLocked` | the same batch again, with backoff, until the deadline; then 503 |
//! | `ResourceExhausted`, `Misconfigured` | 503 for all, nothing is split |
//! | `RowLocked`, `TimedOut`, `Rejected` | the transaction is dropped and the batch halved, down to the one command that is to blame: one that waits for a lock goes back to the queue like any key in use, one that takes too long gets 503, one that the database refuses gets 500. The others get their answers |
//!
//! After any error the transaction is dropped and never committed: `commit()`
//! returns `Ok` although a failed transaction was rolled back.
//!
//! # Duplicates within the process
//!
//! A command whose key is already queued or running here does not enter a
//! batch; it waits in memory for what becomes of the first, on its own clock.
//! It is judged by the row that the first one reports, and not by the first
//! command's fingerprint: until the row is committed nobody knows which request
//! the key belongs to. If the first one meets a fault, the next in line asks
//! for itself.
//!
//! # Detached
//!
//! The work belongs to the writer. A client that hangs up drops the receiving
//! end of a channel, and nothing else changes.

mod batch;
mod change;

pub(crate) use batch::ATTEMPT_TIMEOUT;

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tracing::error;
use uuid::Uuid;

use crate::{
    changes::{ChangeCharge, ChargeChange},
    charges::CreateCharge,
    db::{Server, replication::Replication},
    error::{Error, Unavailable},
    idempotency::{Answer, Duplicate, FieldDigests, Fingerprint, Rule, Scope},
    ids::{ChargeId, RequestId},
};

#[cfg(doc)]
use crate::db::ErrorClass;

/// Writing tasks per process, each with a connection of its own.
pub const TASKS: usize = 2;

/// How the writer is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it connects to.
    pub server: Server,
    /// Most commands in one transaction.
    pub batch_max: usize,
    /// Most commands that are queued or running; more are refused with 503.
    pub queue_max: u32,
}

/// The way to have something written. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Writer {
    shared: Arc<Shared>,
    queue_max: u32,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

#[derive(Debug)]
struct Shared {
    queue: mpsc::UnboundedSender<Job>,
    /// A permit per command that was taken and has not been concluded.
    room: Arc<Semaphore>,
    /// Who waits for which key that is queued or running here.
    waiting: Mutex<HashMap<Scope, Vec<oneshot::Sender<Resolution>>>>,
}

/// What the writer does.
#[derive(Debug, Clone)]
pub enum Command {
    /// A new charge.
    CreateCharge(Box<CreateCharge>),
    /// Something becomes of one that is there.
    ChangeCharge(Box<ChangeCharge>),
}

macro_rules! of_both {
    ($(#[$doc:meta])* $name:ident: $type:ty = $command:ident => $create:expr, $change:expr) => {
        $(#[$doc])*
        fn $name(&self) -> $type {
            match self {
                Self::CreateCharge($command) => $create,
                Self::ChangeCharge($command) => $change,
            }
        }
    };
}

impl Command {
    of_both!(scope: &Scope = command => &command.scope, &command.scope);
    of_both!(fingerprint: Fingerprint = command => command.fingerprint, command.fingerprint);
    of_both!(rule: Rule = command => command.rule, command.rule);
    of_both!(charge_id: ChargeId = command => command.charge.id, command.charge_id);
    of_both!(
        /// About how much of it goes to the database, in bytes.
        bytes: usize = command => command.bytes(), command.bytes()
    );
    of_both!(
        /// By which its work is found again.
        operation_id: Uuid = command => command.charge.id.0, command.operation_id
    );

    /// Fingerprint and digests of the request by the rule of a version of theirs;
    /// `None` if it is newer than this release.
    fn by_version(&self, version: u8) -> Option<(Fingerprint, FieldDigests)> {
        match self {
            Self::CreateCharge(create) => {
                create.digests.by_version(version, &create.charge.request)
            }
            Self::ChangeCharge(change) => {
                let digests = &change.digests;
                match &change.change {
                    ChargeChange::Capture(request) => digests.by_version(version, request),
                    ChargeChange::Refund(request) => digests.by_version(version, request),
                    ChargeChange::Update(request) => digests.by_version(version, request),
                }
            }
        }
    }
}

/// What became of a command, as told to all that wait for its key.
#[derive(Debug, Clone)]
enum Resolution {
    /// The key's row, committed, says this.
    Row(Arc<KeyRecord>),
    /// Another replica holds the key, and the wait has passed.
    InUse,
    /// Nothing was done, and the key is free, for this reason.
    Undone(Error),
    /// The database could not be had in time, for this reason.
    Unavailable(Unavailable),
    /// The database refuses this command, or we have a bug.
    Internal,
}

/// A committed row of a key.
#[derive(Debug)]
struct KeyRecord {
    fingerprint: Fingerprint,
    digests: Option<Vec<u8>>,
    operation_id: Uuid,
    request_id: RequestId,
    answer: Answer,
    /// The charge that the guard warned of when this one was made.
    duplicate_of: Option<ChargeId>,
}

/// What the client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Status and body.
    pub answer: Answer,
    /// Whether the answer is one that was given before.
    pub replayed: bool,
    /// The charge looks like this one, which was made just before it under another
    /// key.
    pub duplicate_of: Option<ChargeId>,
}

/// A command on its way through the queue and the batches.
#[derive(Debug)]
struct Job {
    command: Arc<Command>,
    /// Until when a key that somebody else holds is waited for.
    wait_until: Instant,
    deadline: Instant,
    shared: Arc<Shared>,
    concluded: bool,
    _permit: OwnedSemaphorePermit,
}

impl Writer {
    /// Starts the writing tasks. They connect when there is something to do.
    #[must_use]
    pub fn start(options: Options) -> Self {
        let (queue, jobs) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            queue,
            room: Arc::new(Semaphore::new(options.queue_max as usize)),
            waiting: Mutex::default(),
        });
        let queue_max = options.queue_max;
        let jobs = Arc::new(tokio::sync::Mutex::new(jobs));
        let options = Arc::new(options);
        let replication = Arc::new(Replication::default());
        let mut tasks = JoinSet::new();
        for _ in 0..TASKS {
            let (jobs, options) = (Arc::clone(&jobs), Arc::clone(&options));
            let replication = Arc::clone(&replication);
            tasks.spawn(async move {
                let run = || {
                    let replication = Arc::clone(&replication);
                    batch::run(Arc::clone(&jobs), Arc::clone(&options), replication)
                };
                // A panic is a bug, and must not take the write path with it: its
                // batch was concluded as Internal when the jobs were dropped.
                let mut task = JoinSet::new();
                task.spawn(run());
                while let Some(Err(_)) = task.join_next().await {
                    // Without the panic's text, which could hold anything.
                    error!("a writing task panicked and is started again");
                    task.spawn(run());
                }
            });
        }
        Self {
            shared,
            queue_max,
            tasks: Arc::new(Mutex::new(tasks)),
        }
    }

    /// Has the command done, once, and gives its answer; a duplicate of a
    /// command that is queued or running waits for it up to `wait`, and nobody
    /// longer than until `deadline`.
    ///
    /// The work goes on if this future is dropped.
    ///
    /// # Errors
    /// [`Error::KeyReused`], [`Error::KeyInUse`] after `wait`,
    /// [`Error::DuplicateRequest`] and [`Error::DuplicateCharge`] where the
    /// command's rule and its guard say so,
    /// [`Error::Unavailable`] at once if the queue is full and otherwise at
    /// `deadline`, [`Error::Internal`].
    pub async fn submit(
        &self,
        command: Command,
        wait: Duration,
        deadline: Instant,
    ) -> Result<Reply, Error> {
        let wait_until = deadline.min(Instant::now() + wait);
        let command = Arc::new(command);
        loop {
            let (leads, verdict) = self.enter(&command, wait_until, deadline)?;
            let until = if leads { deadline } else { wait_until };
            match timeout_at(until, verdict).await {
                Ok(Ok(Resolution::Row(row))) => return row.judge(&command),
                Ok(Ok(Resolution::InUse)) if leads => return Err(Error::KeyInUse),
                Ok(Ok(Resolution::Undone(why))) if leads => return Err(why),
                Ok(Ok(Resolution::Unavailable(why))) if leads => {
                    return Err(Error::Unavailable(why));
                }
                // Cut off at the shutdown's deadline: it may have been committed.
                Ok(Err(_)) if leads && self.shared.room.is_closed() => {
                    return Err(Error::Unavailable(Unavailable::ShuttingDown));
                }
                Ok(Ok(Resolution::Internal) | Err(_)) if leads => return Err(Error::Internal),
                // The first one met a fault, on its own clock. Ours still runs.
                Ok(_) => {}
                Err(_) if leads => return Err(Error::Unavailable(Unavailable::Database)),
                Err(_) => return Err(Error::KeyInUse),
            }
        }
    }

    /// Joins those that wait for the command's key. The first of them leads:
    /// its command goes into the queue.
    fn enter(
        &self,
        command: &Arc<Command>,
        wait_until: Instant,
        deadline: Instant,
    ) -> Result<(bool, oneshot::Receiver<Resolution>), Error> {
        let (tell, verdict) = oneshot::channel();
        let mut waiting = self.shared.waiting();
        match waiting.entry(command.scope().clone()) {
            Entry::Occupied(mut others) => {
                others.get_mut().push(tell);
                Ok((false, verdict))
            }
            Entry::Vacant(place) => {
                let room = Arc::clone(&self.shared.room);
                let permit = room.try_acquire_owned().map_err(|why| {
                    Error::Unavailable(match why {
                        TryAcquireError::Closed => Unavailable::ShuttingDown,
                        TryAcquireError::NoPermits => Unavailable::QueueFull,
                    })
                })?;
                place.insert(vec![tell]);
                drop(waiting);
                Job {
                    command: Arc::clone(command),
                    wait_until,
                    deadline,
                    shared: Arc::clone(&self.shared),
                    concluded: false,
                    _permit: permit,
                }
                .enqueue();
                Ok((true, verdict))
            }
        }
    }

    /// Whether a command with this key is queued or running here.
    #[must_use]
    pub fn is_in_flight(&self, scope: &Scope) -> bool {
        self.shared.waiting().contains_key(scope)
    }

    /// Finishes what was taken, for at most `limit`, and ends the tasks, which
    /// closes their connections. Commands that come from now on are refused.
    /// Says whether everything was finished.
    pub async fn shut_down(&self, limit: Duration) -> bool {
        let all = self.shared.room.acquire_many(self.queue_max);
        let all = timeout(limit, all).await;
        self.shared.room.close();
        // Held until here, so that nothing came in between.
        let finished = all.is_ok();
        drop(all);
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        finished
    }
}

impl Shared {
    fn waiting(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<Scope, Vec<oneshot::Sender<Resolution>>>> {
        // Every change under this lock is a single insert, push or remove, so
        // a panic elsewhere cannot have left it half done.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyRecord {
    /// What the row means for whoever sent `command`.
    fn judge(&self, command: &Command) -> Result<Reply, Error> {
        let own = self.operation_id == command.operation_id();
        if !own && self.fingerprint != command.fingerprint() {
            // Of an older release, perhaps: compared by that one's rule.
            let Some((ours, digests)) = command.by_version(self.fingerprint.version()) else {
                return Err(Error::Unavailable(Unavailable::NewerRelease));
            };
            if self.fingerprint != ours {
                let stored = self.digests.as_deref();
                return Err(Error::KeyReused(
                    stored.and_then(|stored| digests.differs(stored)),
                ));
            }
        }
        match command.rule().duplicate {
            Duplicate::Refuse if !own => Err(Error::DuplicateRequest {
                original: self.request_id,
                charge: Some(match command {
                    Command::CreateCharge(_) => ChargeId(self.operation_id),
                    Command::ChangeCharge(change) => change.charge_id,
                }),
            }),
            _ => Ok(Reply {
                answer: self.answer.clone(),
                replayed: !own,
                duplicate_of: self.duplicate_of,
            }),
        }
    }
}

impl Job {
    /// Puts it into the queue, for the first time or again.
    fn enqueue(self) {
        let queue = self.shared.queue.clone();
        // Fails only when no task is left, and then dropping the job tells
        // those who wait.
        let _ = queue.send(self);
    }

    /// Puts it into the queue again after a pause, beside the batch.
    fn enqueue_after(self, pause: Duration) {
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            self.enqueue();
        });
    }

    /// Tells all that wait for the key.
    fn conclude(mut self, verdict: &Resolution) {
        self.concluded = true;
        for tell in self.release() {
            // Whoever hung up does not listen, and that is all right.
            let _ = tell.send(verdict.clone());
        }
    }

    fn release(&self) -> Vec<oneshot::Sender<Resolution>> {
        self.shared
            .waiting()
            .remove(self.command.scope())
            .unwrap_or_default()
    }
}

impl Drop for Job {
    /// A job that is lost in a panic or at the shutdown's deadline leaves
    /// nobody waiting: the closed channel tells them.
    fn drop(&mut self) {
        // Once concluded, the key may be somebody else's already.
        if !self.concluded {
            drop(self.release());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        charges::{Charge, ChargeRequest},
        db,
        idempotency::{Key, Scenario},
        ids::AccountId,
        money::{Amount, Currency},
        processor::Outcome,
    };

    fn command() -> Command {
        let request = ChargeRequest {
            amount: Amount::new(5000).unwrap(),
            currency: Currency::from_code("usd").unwrap(),
            customer: None,
            source: None,
            description: None,
            metadata: BTreeMap::new(),
            capture: true,
        };
        let fingerprint = Fingerprint::new("POST", "/v1/charges", &request);
        let digests = FieldDigests::new("POST", "/v1/charges", &request);
        let charge = Charge::decided(request, Outcome::Approved, RequestId::new());
        let command = CreateCharge {
            digests,
            scope: Scope {
                account_id: AccountId::new(),
                key: Key::from_header(b"order_1").unwrap(),
            },
            fingerprint,
            rule: Scenario::Payment.default_rule(),
            keyed: true,
            guard: None,
            answer: charge.answer(),
            charge,
        };
        Command::CreateCharge(Box::new(command))
    }

    /// Between a verdict and the end of its job the key may have got a new
    /// leader, who must not be forgotten.
    #[tokio::test]
    async fn a_concluded_job_lets_go_of_nobody_else() {
        let nowhere = db::connect_options("postgres://127.0.0.1:1/none").unwrap();
        let writer = Writer::start(Options {
            server: Server::direct(nowhere),
            batch_max: 1,
            queue_max: 2,
        });
        let command = Arc::new(command());
        let job = |concluded| Job {
            command: Arc::clone(&command),
            wait_until: Instant::now(),
            deadline: Instant::now(),
            shared: Arc::clone(&writer.shared),
            concluded,
            _permit: Arc::clone(&writer.shared.room).try_acquire_owned().unwrap(),
        };
        let (tell, mut verdict) = oneshot::channel();
        let waiting = || writer.shared.waiting();
        waiting().insert(command.scope().clone(), vec![tell]);
        drop(job(true));
        assert!(waiting().contains_key(command.scope()));
        // And one that is lost before its verdict leaves nobody waiting.
        drop(job(false));
        assert!(waiting().is_empty());
        assert!(verdict.try_recv().is_err());
    }
}
