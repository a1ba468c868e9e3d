//! Synchronous replication: when an answer that rests on somebody else's rows is
//! as durable as one that rests on our own.
//!
//! With `synchronous_standby_names` set, COMMIT comes back when a standby has the
//! transaction, and until then nobody sees its rows. Three things break that rule
//! and make rows visible that no standby has: a crash restart of the server, a
//! backend that is terminated while its COMMIT waits, and a wait that was cancelled
//! (`pg_cancel_backend`). If the server is lost then, the standby takes over without
//! these rows. A COMMIT that wrote nothing waits for nobody, so a transaction that
//! only found such a row would be told "committed" at once, and its client "200".
//!
//! So:
//!
//! - **A transaction that answers from a row it did not write leaves a WAL record of
//!   its own** ([`leave_record`]). Its COMMIT then waits until the standby has all
//!   that was written before, the row among it. `pg_current_xact_id()` alone writes
//!   nothing and does not do it.
//! - **Not where an earlier COMMIT has proved it already.** [`Replication`] remembers
//!   the horizon of the last transaction that left a record and whose COMMIT came
//!   back: all transactions below it were over when its snapshot was taken, so their
//!   records come before its own, so the standby has them. A transaction whose COMMIT
//!   still waits is not over, and holds the horizon down. A row below the horizon is
//!   answered without a record, also while the standby is away. The horizon belongs to
//!   one start of one server, and is forgotten when another one answers.
//! - **A COMMIT that comes back with a warning is no acknowledgement** ([`commit`]):
//!   that is how the server says that the wait was cancelled. The batch is run again,
//!   finds its own rows, and leaves a record.
//!
//! Without standbys none of this sends anything. Whether there are any is read in the
//! statement that reads the rows (`current_setting`), since it can change while the
//! server runs. If the names are taken away between that statement and its COMMIT, the
//! COMMIT does not wait, as every COMMIT of that moment does not.
//!
//! **What a plain read may show.** `GET` and lists answer from what the primary shows,
//! and leave no record: after one of the three things above they can show a charge that
//! a failover takes back. Whoever has to be certain sends the `POST` again with its key.

use std::{
    cell::Cell,
    pin::pin,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use sqlx::{Executor, PgConnection, Postgres, Row, Transaction};
use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber, dispatcher, level_filters::LevelFilter, span,
    subscriber::Interest,
};

/// One start of one server, by the time of its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerStart(pub(super) String);

/// Which transaction wrote a row, as read on a server with synchronous standbys.
/// Transaction ids with their epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenBy {
    /// Who wrote the row; never older than it really is.
    pub xid: u64,
    /// All transactions below this were over when the row was read.
    pub horizon: u64,
}

impl WrittenBy {
    /// From the row's `xmin`, which has no epoch, and the reading statement's
    /// snapshot. Of all transactions that `xmin` could mean it takes the newest that
    /// the snapshot can have seen: where that is wrong the row is older.
    #[must_use]
    pub fn of(xmin: u32, horizon: u64, snapshot_end: u64) -> Self {
        let low = u32::try_from(snapshot_end & u64::from(u32::MAX)).unwrap_or_default();
        let behind = u64::from(low.wrapping_sub(xmin));
        Self {
            xid: snapshot_end.saturating_sub(behind),
            horizon,
        }
    }
}

/// What this process knows of the standbys.
#[derive(Debug, Default)]
pub struct Replication {
    confirmed: Mutex<Option<(ServerStart, u64)>>,
    stalled: AtomicBool,
}

impl Replication {
    /// Below which transaction a standby is known to have everything; 0: nothing is
    /// known of this server.
    #[must_use]
    pub fn confirmed(&self, server: &ServerStart) -> u64 {
        let confirmed = self
            .confirmed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*confirmed {
            Some((known, horizon)) if known == server => *horizon,
            _ => 0,
        }
    }

    /// A transaction that left a record has committed, and saw this horizon.
    pub fn confirm(&self, server: &ServerStart, horizon: u64) {
        let mut confirmed = self
            .confirmed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &mut *confirmed {
            Some((known, old)) if known == server => *old = horizon.max(*old),
            other => *other = Some((server.clone(), horizon)),
        }
    }

    /// Whether COMMITs wait for a standby that does not answer.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Notes whether they do, and logs it when it changes.
    pub fn set_stalled(&self, stalled: bool) {
        let changed = self.stalled.swap(stalled, Ordering::Relaxed) != stalled;
        if changed && stalled {
            tracing::error!(
                "no synchronous standby confirms what is written: keys that are known are answered, everything else gets 503 until one does"
            );
        } else if changed {
            tracing::info!("a synchronous standby confirms again");
        }
    }
}

/// Whether a COMMIT of this user's in this database has waited for a standby for two
/// seconds or more. Whoever may not see other sessions' states sees those of its own
/// role, which are the service's.
pub(super) const STALLED: &str = "exists (
    select from pg_stat_activity
    where wait_event = 'SyncRep' and datname = current_database()
      and query_start < clock_timestamp() - interval '2 s'
)";

/// Whether COMMITs wait for a standby, as the server knows it.
///
/// # Errors
/// Any database error.
pub async fn stalled(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let query = sqlx::AssertSqlSafe(format!("select {STALLED}"));
    let row = conn.fetch_all(sqlx::raw_sql(query)).await?.pop();
    row.ok_or(sqlx::Error::RowNotFound)?.try_get(0)
}

/// Makes the transaction's COMMIT wait for the standby although it wrote no rows.
///
/// # Errors
/// Any database error.
pub async fn leave_record(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    conn.execute("select pg_logical_emit_message(true, 'payonce', '')")
        .await?;
    Ok(())
}

/// Commits, and takes a COMMIT that the server warns of for none.
///
/// # Errors
/// Any database error; a protocol error if the server warned, and then the
/// transaction is committed on this server and nothing is known of the standby.
pub async fn commit(transaction: Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
    acknowledged(transaction.commit()).await
}

/// The same for a COMMIT that is sent by this future.
///
/// # Errors
/// As [`commit`].
pub async fn acknowledged(
    commit: impl Future<Output = Result<(), sqlx::Error>>,
) -> Result<(), sqlx::Error> {
    // sqlx gives a server's warnings to `tracing` and to nobody else. Its event comes
    // while the future is polled, on this thread.
    let mut commit = pin!(commit);
    let mut warned = false;
    std::future::poll_fn(|context| {
        let _watch = dispatcher::set_default(WARNINGS.get_or_init(Warnings::dispatch));
        let polled = commit.as_mut().poll(context);
        warned |= WARNED.replace(false);
        polled
    })
    .await?;
    if warned {
        return Err(sqlx::Error::Protocol(
            "COMMIT came back with a warning: the wait for the standby was cancelled".to_owned(),
        ));
    }
    Ok(())
}

static WARNINGS: OnceLock<Dispatch> = OnceLock::new();

thread_local! {
    static WARNED: Cell<bool> = const { Cell::new(false) };
}

/// Notes warnings of the server, and hands everything on to whoever listened before.
struct Warnings {
    inner: Dispatch,
    level: LevelFilter,
}

impl Warnings {
    fn dispatch() -> Dispatch {
        Dispatch::new(Self {
            inner: dispatcher::get_default(Clone::clone),
            level: LevelFilter::current().max(LevelFilter::WARN),
        })
    }
}

fn is_warning(metadata: &Metadata<'_>) -> bool {
    metadata.target() == "sqlx::postgres::notice" && *metadata.level() == Level::WARN
}

impl Subscriber for Warnings {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_warning(metadata) {
            Interest::always()
        } else {
            self.inner.register_callsite(metadata)
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_warning(metadata) || self.inner.enabled(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        self.inner.new_span(attributes)
    }

    fn record(&self, id: &span::Id, values: &span::Record<'_>) {
        self.inner.record(id, values);
    }

    fn record_follows_from(&self, id: &span::Id, follows: &span::Id) {
        self.inner.record_follows_from(id, follows);
    }

    fn event(&self, event: &Event<'_>) {
        if is_warning(event.metadata()) {
            WARNED.set(true);
        }
        if self.inner.enabled(event.metadata()) {
            self.inner.event(event);
        }
    }

    fn enter(&self, id: &span::Id) {
        self.inner.enter(id);
    }

    fn exit(&self, id: &span::Id) {
        self.inner.exit(id);
    }

    fn clone_span(&self, id: &span::Id) -> span::Id {
        self.inner.clone_span(id)
    }

    fn try_close(&self, id: span::Id) -> bool {
        self.inner.try_close(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_never_taken_for_an_older_one() {
        let epoch = 1 << 32;
        for (xmin, snapshot_end, xid) in [
            (900, 1000, 900),
            (900, epoch + 1000, epoch + 900),
            // From before the epoch's end.
            (u32::MAX, epoch + 5, epoch - 1),
            // Frozen at initdb: anything up to now will do.
            (2, epoch + 1, epoch + 2 - epoch),
        ] {
            assert_eq!(
                WrittenBy::of(xmin, 0, snapshot_end).xid,
                xid,
                "{xmin} {snapshot_end}"
            );
        }
    }

    #[test]
    fn a_horizon_is_of_one_start_of_one_server_and_only_rises() {
        let replication = Replication::default();
        let [one, other] = ["one", "other"].map(|name| ServerStart(name.to_owned()));
        assert_eq!(replication.confirmed(&one), 0);
        replication.confirm(&one, 7);
        replication.confirm(&one, 5);
        assert_eq!(replication.confirmed(&one), 7);
        replication.confirm(&other, 3);
        assert_eq!(replication.confirmed(&other), 3);
        assert_eq!(replication.confirmed(&one), 0);
    }
}
