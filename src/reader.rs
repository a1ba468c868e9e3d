//! The reader: charges by their ids, many to a statement.
//!
//! Who asks for a charge puts a question into a queue; a reading task takes all
//! that wait, and answers them from one statement, while the next ones gather. It
//! is the writer's way without a transaction, and for the same reason: a round
//! trip costs more than what it carries, and a pool pays three or four for each
//! read, since it looks after its connections before and after.
//!
//! A read changes nothing, so it is done again after whatever passes, until the
//! deadline of who asked. The queue is bounded: who finds it full is told so at once.

use std::{
    collections::{HashMap, VecDeque},
    io::ErrorKind,
    sync::Arc,
};

use sqlx::PgConnection;
use tokio::{
    sync::{
        Mutex,
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::Instant,
};
use tracing::{error, warn};

use crate::{
    charges::{self, Charge},
    db::{self, ErrorClass, READ_TIMEOUT, Server, backoff, describe},
    error::{Error, Unavailable},
    ids::{AccountId, ChargeId},
};

/// Most questions of one statement.
const BATCH_MAX: usize = 256;

/// Most questions that wait for a reading task: some 50 ms of its work.
const WAITING_MAX: usize = 16 * BATCH_MAX;

/// Reading tasks per process, each with a connection of its own: one prepares
/// while the other waits.
const TASKS: usize = 2;

/// The way to read a charge. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Reader {
    queue: mpsc::Sender<Question>,
}

#[derive(Debug)]
struct Question {
    id: (AccountId, ChargeId),
    deadline: Instant,
    tell: oneshot::Sender<Result<Option<Charge>, ErrorClass>>,
}

impl Reader {
    /// Starts the reading tasks, which connect when there is something to do and
    /// end when nobody can ask any more.
    #[must_use]
    pub fn start(server: &Server) -> Self {
        let (queue, questions) = mpsc::channel(WAITING_MAX);
        let questions = Arc::new(Mutex::new(questions));
        for _ in 0..TASKS {
            let (server, questions) = (server.clone(), Arc::clone(&questions));
            tokio::spawn(async move {
                // A panic is a bug, and must not take the reads with it.
                loop {
                    let task = Task {
                        server: server.clone(),
                        conn: None,
                    };
                    if tokio::spawn(task.run(Arc::clone(&questions))).await.is_ok() {
                        return;
                    }
                    error!("a reading task panicked and is started again");
                }
            });
        }
        Self { queue }
    }

    /// The account's charge of this id, if there is one.
    ///
    /// # Errors
    /// [`Error::Unavailable`], at once if too many wait already, and otherwise at
    /// `deadline`; [`Error::Internal`].
    pub async fn charge(
        &self,
        account_id: AccountId,
        charge_id: ChargeId,
        deadline: Instant,
    ) -> Result<Option<Charge>, Error> {
        let (tell, answer) = oneshot::channel();
        let question = Question {
            id: (account_id, charge_id),
            deadline,
            tell,
        };
        self.queue.try_send(question).map_err(|why| match why {
            TrySendError::Full(_) => Error::Unavailable(Unavailable::ReadsFull),
            TrySendError::Closed(_) => Error::Internal,
        })?;
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(found)) => Ok(found?),
            // A task that panics drops what it has taken.
            Ok(Err(_)) => Err(Error::Internal),
            Err(_) => Err(Error::Unavailable(Unavailable::Database)),
        }
    }
}

struct Task {
    server: Server,
    conn: Option<PgConnection>,
}

impl Task {
    async fn run(mut self, questions: Arc<Mutex<mpsc::Receiver<Question>>>) {
        loop {
            let mut batch = Vec::new();
            // Held while waiting, so that one of the tasks gets all that is there.
            let taken = questions
                .lock()
                .await
                .recv_many(&mut batch, BATCH_MAX)
                .await;
            if taken == 0 {
                return;
            }
            self.answer(batch).await;
        }
    }

    /// Answers all of them, whatever comes.
    async fn answer(&mut self, batch: Vec<Question>) {
        let mut pauses = backoff();
        let mut parts = VecDeque::from([batch]);
        while let Some(mut part) = parts.pop_front() {
            part.retain(|question| !question.tell.is_closed());
            if part.is_empty() {
                continue;
            }
            let error = match self.attempt(&part).await {
                Ok(found) => {
                    for question in part {
                        // Not taken out: others may ask for the same one. Whoever
                        // hung up does not listen.
                        let charge = found.get(&question.id).cloned();
                        let _ = question.tell.send(Ok(charge));
                    }
                    continue;
                }
                Err(error) => error,
            };
            let class = ErrorClass::of(&error);
            warn!(error = %describe(&error), ?class, batch_len = part.len(), "a read failed");
            if part.len() > 1 && class == ErrorClass::Rejected {
                // A row that cannot be read is nobody else's class.
                parts.extend(part.into_iter().map(|question| vec![question]));
                continue;
            }
            if !class.is_retryable_read() {
                give_up(part, class);
                continue;
            }
            let pause = pauses.next().unwrap_or_default();
            let then = Instant::now() + pause;
            let (late, mut rest): (Vec<_>, Vec<_>) =
                part.into_iter().partition(|q| q.deadline <= then);
            give_up(late, class);
            if rest.len() > 1 && took_too_long(&error) {
                // All of it may be too much for the network in the time of a read.
                let second = rest.split_off(rest.len() / 2);
                parts.push_back(second);
            }
            parts.push_back(rest);
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(
        &mut self,
        batch: &[Question],
    ) -> Result<HashMap<(AccountId, ChargeId), Charge>, sqlx::Error> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.server.connect().await?.conn,
        };
        // One question each, however many ask it.
        let mut ids: Vec<_> = batch.iter().map(|question| question.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let found = db::within(READ_TIMEOUT, async {
            if !self.server.behind_pooler {
                return charges::find(&mut conn, &ids).await;
            }
            let mut transaction = self.server.begin(&mut conn).await?;
            let found = charges::find(&mut transaction, &ids).await?;
            transaction.commit().await?;
            Ok(found)
        })
        .await?;
        // Kept only after what went well: anything else may have left it in doubt.
        self.conn = Some(conn);
        Ok(found)
    }
}

fn took_too_long(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == ErrorKind::TimedOut,
        error => ErrorClass::of(error) == ErrorClass::TimedOut,
    }
}

fn give_up(batch: Vec<Question>, class: ErrorClass) {
    for question in batch {
        let _ = question.tell.send(Err(class));
    }
}

#[cfg(test)]
mod tests {
    use std::{task::Poll, time::Duration};

    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn one_more_than_may_wait_is_refused_at_once() {
        let nowhere = db::connect_options("postgres://127.0.0.1:1/none").unwrap();
        let reader = Reader::start(&Server::direct(nowhere));
        let in_an_hour = Instant::now() + Duration::from_hours(1);
        let ask = || Box::pin(reader.charge(AccountId::new(), ChargeId::new(), in_an_hour));
        // The tasks have no thread to run on while this does not wait.
        let mut waiting: Vec<_> = (0..WAITING_MAX).map(|_| ask()).collect();
        for question in &mut waiting {
            assert!(poll!(question).is_pending());
        }
        let refused = Err(Error::Unavailable(Unavailable::ReadsFull));
        assert_eq!(poll!(ask()), Poll::Ready(refused));
    }
}
