//! The reader: charges by their ids, many to a statement.
//!
//! Who asks for a charge puts a question into a queue; a reading task takes all
//! that wait, and answers them from one statement, while the next ones gather. It
//! is the writer's way without a transaction, and for the same reason: a round
//! trip costs more than what it carries, and a pool pays three or four for each
//! read, since it looks after its connections before and after.
//!
//! A read changes nothing, so it is done again after whatever passes, until the
//! deadline of who asked.

use std::{collections::HashMap, sync::Arc};

use sqlx::PgConnection;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::Instant,
};
use tracing::{error, warn};

use crate::{
    charges::{self, Charge},
    db::{self, READ_TIMEOUT, Server, Trouble, backoff, describe},
    ids::{AccountId, ChargeId},
};

/// Most questions of one statement.
const BATCH_MAX: usize = 256;

/// Reading tasks per process, each with a connection of its own: one prepares
/// while the other waits.
const TASKS: usize = 2;

/// The way to read a charge. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Reader {
    queue: mpsc::UnboundedSender<Question>,
}

#[derive(Debug)]
struct Question {
    id: (AccountId, ChargeId),
    deadline: Instant,
    tell: oneshot::Sender<Result<Option<Charge>, Trouble>>,
}

impl Reader {
    /// Starts the reading tasks, which connect when there is something to do and
    /// end when nobody can ask any more.
    #[must_use]
    pub fn start(server: &Server) -> Self {
        let (queue, questions) = mpsc::unbounded_channel();
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
    /// What was in the way until `deadline`.
    pub async fn charge(
        &self,
        account_id: AccountId,
        charge_id: ChargeId,
        deadline: Instant,
    ) -> Result<Option<Charge>, Trouble> {
        let (tell, answer) = oneshot::channel();
        let question = Question {
            id: (account_id, charge_id),
            deadline,
            tell,
        };
        // A task that panics drops what it has taken.
        self.queue.send(question).map_err(|_| Trouble::Refused)?;
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(answer) => answer.unwrap_or(Err(Trouble::Refused)),
            Err(_) => Err(Trouble::Passing),
        }
    }
}

struct Task {
    server: Server,
    conn: Option<PgConnection>,
}

impl Task {
    async fn run(mut self, questions: Arc<Mutex<mpsc::UnboundedReceiver<Question>>>) {
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
    async fn answer(&mut self, mut batch: Vec<Question>) {
        let mut pauses = backoff();
        loop {
            batch.retain(|question| !question.tell.is_closed());
            if batch.is_empty() {
                return;
            }
            let error = match self.attempt(&batch).await {
                Ok(found) => {
                    for question in batch {
                        // Not taken out: others may ask for the same one. Whoever
                        // hung up does not listen.
                        let charge = found.get(&question.id).cloned();
                        let _ = question.tell.send(Ok(charge));
                    }
                    return;
                }
                Err(error) => error,
            };
            let trouble = Trouble::of(&error);
            warn!(error = %describe(&error), ?trouble, batch_len = batch.len(), "a read failed");
            // A row that cannot be read is nobody else's trouble.
            if trouble == Trouble::Refused && batch.len() > 1 {
                for question in batch {
                    Box::pin(self.answer(vec![question])).await;
                }
                return;
            }
            if !trouble.passes_for_a_read() {
                give_up(batch, trouble);
                return;
            }
            let pause = pauses.next().unwrap_or_default();
            let then = Instant::now() + pause;
            let (late, rest) = batch.into_iter().partition(|q| q.deadline <= then);
            give_up(late, trouble);
            batch = rest;
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

fn give_up(batch: Vec<Question>, trouble: Trouble) {
    for question in batch {
        let _ = question.tell.send(Err(trouble));
    }
}
