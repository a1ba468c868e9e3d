//! The purge: removes answers that are past their time.
//!
//! Each step is one short statement in a transaction of its own, so a purge never
//! holds a lock for long, and a step that dies has done nothing. `skip locked`
//! lets any number of replicas purge side by side, and lets a request that
//! takes an expired key over go first. A row without an answer stays: it is the
//! lock of work under way. If the row of an operation goes just before its
//! retry comes, the charge still carries the key.
//!
//! # Where it was
//!
//! A step walks along the index on `expires_at`. Rows that were deleted stay in it
//! as long as any snapshot is older than their deletion (a backup, a long report),
//! and vacuum cannot help: a purge that began at the oldest row each time would walk
//! past all that it has deleted since, more with every step. So a [`Purge`]
//! remembers up to where it has been, and goes on from there.
//!
//! What it leaves behind: rows that another transaction held, or whose transaction
//! committed after they had expired; after a step of another replica that was rolled
//! back, its rows; after the database's clock was set back, rows that expire before
//! the place it has reached. All of them are expired for everybody who meets them,
//! and only take up room. [`run_forever`] begins anew at the oldest row every hour,
//! and then finds them. If that one walk takes too long, it goes on from where it
//! was; a purge that has just been started, from an hour ago.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgExecutor, PgPool};
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::db::{self, ErrorClass, NonPersistent};

/// Rows of one step. Large enough that the steps' commits do not count, small
/// enough that a step takes milliseconds.
pub const STEP_ROWS: i64 = 1000;

/// How long a step may take. More than the server's `statement_timeout`: it
/// strikes where the connection died silently, and would keep the purge forever.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a purge begins anew at the oldest row, and how far back one begins
/// that cannot: [`Start::Recent`].
const SWEEP_INTERVAL: Duration = Duration::from_hours(1);

/// A purge, and where in the order of expiry it is. A new one begins at the oldest
/// row.
#[derive(Debug, Default)]
pub struct Purge {
    start: Start,
    /// Where to go on if the walk from the oldest row takes too long.
    reached: Start,
}

/// Where the next step begins.
#[derive(Debug, Clone, Copy, Default)]
enum Start {
    #[default]
    Oldest,
    /// At rows that expired in the last hour.
    Recent,
    /// At rows that expired at this time or later.
    At(DateTime<Utc>),
}

impl Purge {
    /// Deletes up to `limit` expired rows, oldest first, from where the last step
    /// ended, and returns how many it deleted.
    ///
    /// # Errors
    /// Any database error; nothing was deleted then.
    pub async fn step(
        &mut self,
        executor: impl PgExecutor<'_>,
        limit: i64,
    ) -> Result<u64, sqlx::Error> {
        let (at, seconds_back) = match self.start {
            Start::Oldest => (None, None),
            Start::Recent => (None, Some(SWEEP_INTERVAL.as_secs_f64())),
            Start::At(at) => (Some(at), None),
        };
        // The lower bound is written as a comparison of rows, since the planner takes
        // two bounds on one column for a narrow range, wherever it has no statistics
        // (0.5 % of the table), and then reads and sorts all that has expired to
        // delete the first thousand. Below it no row is left out: no account_id is
        // less than the nil UUID.
        //
        // Planned for the tables as they are: both joins have to find their rows by
        // an index.
        //
        // Its commit waits for no standby: where one is away, each step would leave a
        // session waiting on the server, and rows that come back with a failover expire
        // again.
        //
        // A row that changes meanwhile is locked, and looked at again, before it is
        // deleted; one that was replaced has a successor that this statement's
        // snapshot cannot see.
        let query = sqlx::query!(
            r#"
            with local as materialized (
                select set_config('synchronous_commit', 'local', true)
            ),
            expired as materialized (
                select account_id, key
                from idempotency_keys
                where exists (select from local)
                    and (expires_at, account_id) >= (
                        coalesce(
                            $1,
                            statement_timestamp() - make_interval(secs => $2),
                            '-infinity'
                        ),
                        '00000000-0000-0000-0000-000000000000'
                    )
                    and expires_at <= statement_timestamp()
                    and response_status is not null
                order by expires_at
                limit $3
                for update skip locked
            ),
            purged as (
                delete from idempotency_keys
                using expired
                where idempotency_keys.account_id = expired.account_id
                    and idempotency_keys.key = expired.key
                returning idempotency_keys.expires_at
            )
            select count(*) as "count!", nullif(max(expires_at), '-infinity') as last,
                statement_timestamp() as "now!"
            from purged
            "#,
            at,
            seconds_back,
            limit,
        );
        // All of its one row, so that the commit is waited for.
        let rows = executor.fetch_all(NonPersistent(query)).await?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        let (count, last, now) = <(i64, Option<DateTime<Utc>>, DateTime<Utc>)>::from_row(row)?;
        if count < limit {
            // There was no more, of ours or anybody's: other replicas' rows are
            // walked past no more either.
            self.start = Start::At(now);
        } else if let Some(last) = last {
            // And not past it: several rows can expire at one time.
            self.start = Start::At(last);
        }
        Ok(count.cast_unsigned())
    }

    /// Deletes all that has expired, and returns the number of rows deleted.
    ///
    /// # Errors
    /// Any database error; the steps before stay done.
    pub async fn run_until_done(&mut self, pool: &PgPool) -> Result<u64, sqlx::Error> {
        let mut total = 0;
        loop {
            let step = db::within(STEP_TIMEOUT, self.step(pool, STEP_ROWS)).await;
            if let Err(error) = &step
                && took_too_long(error)
                && matches!(self.start, Start::Oldest)
            {
                self.start = match self.reached {
                    Start::Oldest => Start::Recent,
                    reached => reached,
                };
            }
            let count = step?;
            total += count;
            // Not "until 0": where answers are kept for a second, the next ones
            // expire while these go.
            if count < STEP_ROWS.cast_unsigned() {
                return Ok(total);
            }
        }
    }

    /// Has the next step begin at the oldest row.
    pub fn start_over(&mut self) {
        self.reached = std::mem::take(&mut self.start);
    }
}

fn took_too_long(error: &sqlx::Error) -> bool {
    let timed_out =
        matches!(error, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut);
    timed_out || ErrorClass::of(error) == ErrorClass::TimedOut
}

/// Deletes up to `limit` expired rows, oldest first, and returns how many.
///
/// # Errors
/// Any database error; nothing was deleted then.
pub async fn run_once(executor: impl PgExecutor<'_>, limit: i64) -> Result<u64, sqlx::Error> {
    Purge::default().step(executor, limit).await
}

/// Deletes all that has expired, and returns the number of rows deleted.
///
/// # Errors
/// Any database error; the steps before stay done.
pub async fn run_until_done(pool: &PgPool) -> Result<u64, sqlx::Error> {
    Purge::default().run_until_done(pool).await
}

/// Purges every `interval`, forever. A fault is logged and met by the next turn.
pub async fn run_forever(pool: PgPool, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut purge, mut swept) = (Purge::default(), Instant::now());
    loop {
        ticks.tick().await;
        if swept.elapsed() >= SWEEP_INTERVAL {
            purge.start_over();
            swept = Instant::now();
        }
        match purge.run_until_done(&pool).await {
            Ok(0) => {}
            Ok(count) => debug!(count, "purged expired answers"),
            Err(error) => warn!(error = %db::describe(&error), "the purge did not finish"),
        }
    }
}
