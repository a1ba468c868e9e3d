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
//!   the horizon of the last transaction that left a record and was waited for: all
//!   transactions below it were over when its snapshot was taken, so their records come
//!   before its own, so the standby has them. A transaction whose COMMIT still waits is
//!   not over, and holds the horizon down. A row below the horizon is answered without a
//!   record, also while the standby is away. The horizon belongs to one start of one
//!   server under one `synchronous_standby_names` ([`Standbys`]).
//! - **A COMMIT that came back proves it only if the names stayed what they were**: taking
//!   them away ends all waits without a warning. So the session is asked again after that
//!   COMMIT whether it has read its configuration anew. It has if that ended the wait:
//!   PostgreSQL signals sessions before the process that ends the waits. Costs a round
//!   trip where the horizon rises, and nowhere else.
//! - **A COMMIT that comes back with a warning may be none that was waited for**
//!   ([`warned`]): that is how the server says that the wait was cancelled. A record of
//!   its own is committed then, until one comes back without a warning
//!   ([`wait_for_standby`]).
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
    cell::{Cell, RefCell},
    pin::pin,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use sqlx::{Executor, PgConnection, Row};
use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber, dispatcher, level_filters::LevelFilter, span,
    subscriber::Interest,
};

/// For whom COMMITs wait: one start of one server, and its `synchronous_standby_names`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standbys(pub(crate) String);

/// Which transaction wrote a row, as read on a server with synchronous standbys.
/// Transaction ids with their epochs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenBy {
    /// Who wrote the row; never older than it really is.
    pub xid: u64,
    /// All transactions below this were over when the row was read.
    pub horizon: u64,
    /// Where it was read.
    pub standbys: Standbys,
}

impl WrittenBy {
    /// From the row's `xmin`, which has no epoch, and the reading statement's
    /// snapshot. Of all transactions that `xmin` could mean it takes the newest that
    /// the snapshot can have seen: where that is wrong the row is older.
    #[must_use]
    pub fn of(xmin: u32, horizon: u64, snapshot_end: u64, standbys: Standbys) -> Self {
        let low = u32::try_from(snapshot_end & u64::from(u32::MAX)).unwrap_or_default();
        let behind = u64::from(low.wrapping_sub(xmin));
        Self {
            xid: snapshot_end.saturating_sub(behind),
            horizon,
            standbys,
        }
    }
}

/// What this process knows of the standbys.
#[derive(Debug, Default)]
pub struct Replication {
    confirmed: Mutex<Option<(Standbys, u64)>>,
    stalled: AtomicBool,
}

impl Replication {
    /// Whether a standby is known to have what this transaction wrote.
    #[must_use]
    pub fn has(&self, by: &WrittenBy) -> bool {
        let confirmed = self
            .confirmed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        matches!(&*confirmed, Some((known, horizon)) if *known == by.standbys && by.xid < *horizon)
    }

    /// A transaction that left a record was waited for, and saw this horizon.
    pub fn confirm(&self, standbys: Standbys, horizon: u64) {
        let mut confirmed = self
            .confirmed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &mut *confirmed {
            Some((known, old)) if *known == standbys => *old = horizon.max(*old),
            other => *other = Some((standbys, horizon)),
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
/// role.
pub(super) const STALLED: &str = "exists (
    select from pg_stat_activity
    where wait_event = 'SyncRep' and datname = current_database() and usename = session_user
      and query ilike 'commit%' and query_start < clock_timestamp() - interval '2 s'
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

/// For whom this session thinks that COMMITs wait, and when it read that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// For whom.
    pub standbys: Standbys,
    read_at: String,
}

impl Configuration {
    /// As it is now.
    ///
    /// # Errors
    /// Any database error.
    pub async fn of(conn: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let query = sqlx::raw_sql(
            "select pg_postmaster_start_time()::text || ' ' || current_setting('synchronous_standby_names'),
                pg_conf_load_time()::text",
        );
        let row = conn.fetch_all(query).await?.pop();
        let row = row.ok_or(sqlx::Error::RowNotFound)?;
        Ok(Self {
            standbys: Standbys(row.try_get(0)?),
            read_at: row.try_get(1)?,
        })
    }
}

/// After a COMMIT that the server has warned of: comes back when a standby has all that
/// was committed before, or when there are no standbys. It may never come.
///
/// # Errors
/// Any database error; nothing is known of the standby then.
pub async fn wait_for_standby(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    // A statement outside of a transaction commits what it wrote. What else could have
    // made the COMMIT warn, a trigger of somebody's, is not run by it.
    let record = "select pg_logical_emit_message(true, 'payonce', '')
        where current_setting('synchronous_standby_names') <> ''";
    while warned(async { conn.execute(record).await.map(drop) }).await? {}
    Ok(())
}

/// Runs a COMMIT, or a statement that commits, and returns whether the server warned. A
/// wait for a standby that was cancelled is such a warning, and the only one that
/// COMMIT itself knows; deferred triggers may raise others.
///
/// sqlx gives a server's warnings to `tracing` and to nobody else, so this listens there
/// for as long as the future is polled. In a process whose logs go to the crate `log`
/// without a subscriber of `tracing`, sqlx's lines end with the first call.
///
/// # Errors
/// Any database error.
pub async fn warned(
    commit: impl Future<Output = Result<(), sqlx::Error>>,
) -> Result<bool, sqlx::Error> {
    let mut commit = pin!(commit);
    let mut warned = false;
    // The event comes while the future is polled, on this thread.
    std::future::poll_fn(|context| {
        let [listener, _] = LISTENERS.get_or_init(|| [(); 2].map(|()| Dispatch::new(Listener)));
        BEHIND.set(Some(dispatcher::get_default(Clone::clone)));
        let listening = dispatcher::set_default(listener);
        let polled = commit.as_mut().poll(context);
        drop(listening);
        BEHIND.take();
        warned |= WARNED.take();
        polled
    })
    .await?;
    Ok(warned)
}

/// Two, since a subscriber that is the only one of a process is not asked by `tracing`
/// about events that come from elsewhere first, and never hears of them afterwards.
static LISTENERS: OnceLock<[Dispatch; 2]> = OnceLock::new();

thread_local! {
    static WARNED: Cell<bool> = const { Cell::new(false) };
    /// Whoever listens when nobody waits for a warning.
    static BEHIND: RefCell<Option<Dispatch>> = const { RefCell::new(None) };
}

/// Notes warnings of the server, and hands everything on to whoever is behind.
struct Listener;

fn behind<T>(act: impl FnOnce(&Dispatch) -> T) -> T {
    let behind = BEHIND.with_borrow(Clone::clone);
    act(&behind.unwrap_or_else(Dispatch::none))
}

fn is_warning(metadata: &Metadata<'_>) -> bool {
    metadata.target() == "sqlx::postgres::notice" && *metadata.level() == Level::WARN
}

impl Subscriber for Listener {
    /// All others are asked for the rest.
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_warning(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_warning(metadata) || behind(|behind| behind.enabled(metadata))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        behind(|behind| behind.new_span(attributes))
    }

    fn record(&self, id: &span::Id, values: &span::Record<'_>) {
        behind(|behind| behind.record(id, values));
    }

    fn record_follows_from(&self, id: &span::Id, follows: &span::Id) {
        behind(|behind| behind.record_follows_from(id, follows));
    }

    fn event(&self, event: &Event<'_>) {
        if is_warning(event.metadata()) {
            WARNED.set(true);
        }
        behind(|behind| {
            if behind.enabled(event.metadata()) {
                behind.event(event);
            }
        });
    }

    fn enter(&self, id: &span::Id) {
        behind(|behind| behind.enter(id));
    }

    fn exit(&self, id: &span::Id) {
        behind(|behind| behind.exit(id));
    }

    fn clone_span(&self, id: &span::Id) -> span::Id {
        behind(|behind| behind.clone_span(id))
    }

    fn try_close(&self, id: span::Id) -> bool {
        behind(|behind| behind.try_close(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice() {
        tracing::warn!(target: "sqlx::postgres::notice", "the wait was cancelled");
    }

    /// In a process where nobody listens to `tracing`, and the first warning comes from
    /// elsewhere.
    #[tokio::test]
    async fn a_warning_is_heard_also_where_nobody_else_listens() {
        assert!(!warned(async { Ok(()) }).await.unwrap());
        notice();
        let commit = async {
            notice();
            Ok(())
        };
        assert!(warned(commit).await.unwrap());
        assert!(!warned(async { Ok(()) }).await.unwrap());
    }

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
                WrittenBy::of(xmin, 0, snapshot_end, Standbys(String::new())).xid,
                xid,
                "{xmin} {snapshot_end}"
            );
        }
    }

    #[test]
    fn a_horizon_is_of_one_start_of_one_server_and_only_rises() {
        let replication = Replication::default();
        let [one, other] = ["one", "other"].map(|name| Standbys(name.to_owned()));
        let has = |xid, standbys: &Standbys| {
            replication.has(&WrittenBy {
                xid,
                horizon: 0,
                standbys: standbys.clone(),
            })
        };
        assert!(!has(0, &one));
        replication.confirm(one.clone(), 7);
        replication.confirm(one.clone(), 5);
        assert_eq!([6, 7].map(|xid| has(xid, &one)), [true, false]);
        assert!(!has(0, &other));
        replication.confirm(other.clone(), 3);
        assert_eq!([2, 3].map(|xid| has(xid, &other)), [true, false]);
        assert!(!has(0, &one));
    }
}
