//! The purge: removes answers that are past their time.
//!
//! Each step is one short statement in a transaction of its own, so a purge never
//! holds a lock for long, and a step that dies has done nothing. `skip locked`
//! lets any number of replicas purge side by side, and lets a request that
//! takes an expired key over go first. A row without an answer stays: it is the
//! lock of work under way. If the row of an operation goes just before its
//! retry comes, the charge still carries the key.

use std::time::Duration;

use sqlx::{PgExecutor, PgPool};
use tracing::{debug, warn};

use crate::db;

/// Rows of one step. Large enough that the steps' commits do not count, small
/// enough that a step takes milliseconds.
pub const STEP_ROWS: i64 = 1000;

/// How long a step may take. More than the server's `statement_timeout`: it
/// strikes where the connection died silently, and would keep the purge forever.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Deletes up to `limit` expired rows, oldest first, and says how many it did.
///
/// # Errors
/// What the database said; nothing was deleted then.
pub async fn run_once(executor: impl PgExecutor<'_>, limit: i64) -> Result<u64, sqlx::Error> {
    // By ctid: the subquery walks along the index on expires_at, and nothing
    // here can be planned as a join. A row that changed meanwhile has another
    // ctid, which this statement's snapshot cannot see, and stays.
    let done = sqlx::query!(
        r#"
        delete from idempotency_keys
        where ctid = any (array(
            select ctid from idempotency_keys
            where expires_at <= statement_timestamp()
              and response_status is not null
            order by expires_at
            limit $1
            for update skip locked
        ))
        "#,
        limit,
    )
    .execute(executor)
    .await?;
    Ok(done.rows_affected())
}

/// Deletes all that has expired, and says how many rows it were.
///
/// # Errors
/// What the database said; the steps before stay done.
pub async fn run_until_done(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let mut total = 0;
    loop {
        let count = db::within(STEP_TIMEOUT, run_once(pool, STEP_ROWS)).await?;
        total += count;
        // Not "until 0": where answers are kept for a second, the next ones
        // expire while these go.
        if count < STEP_ROWS.cast_unsigned() {
            return Ok(total);
        }
    }
}

/// Purges every `interval`, forever. A fault is logged and met by the next turn.
pub async fn run_forever(pool: PgPool, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match run_until_done(&pool).await {
            Ok(0) => {}
            Ok(count) => debug!(count, "purged expired answers"),
            Err(error) => warn!(error = %db::describe(&error), "the purge did not finish"),
        }
    }
}
