//! How the service reaches PostgreSQL, and what its sessions are set to.

use std::{fmt::Write, sync::Arc, time::Duration};

use sqlx::{
    AssertSqlSafe, Connection, Executor, PgConnection, PgPool, Postgres, Row, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::{READ_TIMEOUT, replication::STALLED, server_name, within};

/// What every session of the service is set to: name, value, and whether it is
/// about transactions (else it is about the connection).
///
/// The time-outs bound how long a replica that vanished or stands still can
/// hold a key, to about five seconds, and how long a batch can wait for a lock
/// that nobody of ours holds.
pub(super) const SESSION: &[(&str, &str, bool)] = &[
    // Shorter than it may be for comfort: a batch that is bisected to find the
    // one command that waits spends it once per level, eight times for 256.
    ("lock_timeout", "250ms", true),
    ("statement_timeout", "3s", true),
    ("idle_in_transaction_session_timeout", "5s", true),
    // No statement of ours needs to read a table from end to end, but one that
    // was planned while the table was empty would, and a prepared one keeps its
    // plan while the table grows. 838 ms instead of 0.9 for 64 keys were measured.
    ("enable_seqscan", "off", true),
    // A warning is how the server says that a COMMIT did not wait for its standby.
    ("client_min_messages", "warning", true),
    // A role's default of repeatable read would turn every lost claim into a
    // serialization failure.
    ("default_transaction_isolation", "read committed", false),
    // A client that is gone is noticed in the middle of a statement too.
    ("client_connection_check_interval", "1s", false),
    ("tcp_keepalives_idle", "2", false),
    ("tcp_keepalives_interval", "1", false),
    ("tcp_keepalives_count", "3", false),
    ("tcp_user_timeout", "5s", false),
];

/// How long one attempt to connect may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// One connection, or an error within two seconds.
///
/// # Errors
/// What went wrong; a time-out is an I/O error.
pub async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    within(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await
}

/// A connection to a server that takes writes.
#[derive(Debug)]
pub struct Session {
    /// The connection.
    pub conn: PgConnection,
    /// Whether COMMITs waited for a standby there when it was made.
    pub stalled: bool,
}

/// Refuses a server that takes no writes, and returns whether COMMITs wait for a standby
/// there. As plain text, so that nothing has to be prepared.
async fn check_writable(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let query = AssertSqlSafe(format!(
        "select current_setting('transaction_read_only') = 'on', {STALLED}"
    ));
    let row = conn.fetch_all(sqlx::raw_sql(query)).await?.pop();
    let row = row.ok_or(sqlx::Error::RowNotFound)?;
    if row.try_get(0)? {
        return Err(sqlx::Error::Protocol(
            "the server is a standby, or read-only".to_owned(),
        ));
    }
    row.try_get(1)
}

/// PostgreSQL as the service reaches it: directly, or through a pooler that
/// gives each transaction another session (PgBouncer's `pool_mode=transaction`).
///
/// Directly, the settings ride in the connection's start packet and cost no
/// round trip, and statements are prepared once. Behind a pooler there is no
/// session to set or to prepare in: every transaction, also that of a read,
/// begins by forgetting what somebody else prepared in its session and setting
/// what holds for it alone.
#[derive(Debug, Clone)]
pub struct Server {
    options: PgConnectOptions,
    begin: Arc<str>,
    pub(crate) behind_pooler: bool,
}

impl Server {
    /// Reached without a pooler.
    #[must_use]
    pub fn direct(options: PgConnectOptions) -> Self {
        let settings = SESSION.iter().map(|&(name, value, _)| (name, value));
        Self {
            options: options.options(settings),
            begin: "begin".into(),
            behind_pooler: false,
        }
    }

    /// Reached through a pooler in transaction mode.
    #[must_use]
    pub fn behind_pooler(options: PgConnectOptions) -> Self {
        // A standby refuses `read write`: behind a pooler each transaction can meet another
        // server, and none of ours may be answered by a standby.
        let mut begin =
            "begin isolation level read committed read write; deallocate all".to_owned();
        for (name, value, _) in SESSION
            .iter()
            .filter(|(_, _, of_transactions)| *of_transactions)
        {
            // Writing to a string does not fail.
            let _ = write!(begin, "; set local {name} = '{value}'");
        }
        Self {
            options: options.statement_cache_capacity(0).extra_float_digits(None),
            begin: begin.into(),
            behind_pooler: true,
        }
    }

    /// Where it is, for people.
    #[must_use]
    pub fn name(&self) -> String {
        server_name(&self.options)
    }

    /// One connection, or an error within two seconds, to whatever server answers.
    ///
    /// # Errors
    /// What went wrong; a time-out is an I/O error.
    pub async fn connect_to_any(&self) -> Result<PgConnection, sqlx::Error> {
        connect(&self.options).await
    }

    /// One connection to a server that takes writes, or an error within four seconds.
    /// A standby may be behind, and what it does not have is not missing.
    ///
    /// # Errors
    /// What went wrong; a time-out is an I/O error, a standby a protocol error.
    pub async fn connect(&self) -> Result<Session, sqlx::Error> {
        let mut conn = self.connect_to_any().await?;
        let stalled = within(CONNECT_TIMEOUT, check_writable(&mut conn)).await?;
        Ok(Session { conn, stalled })
    }

    /// Begins a transaction in which the settings are in force: one round trip.
    ///
    /// # Errors
    /// Any database error.
    pub async fn begin<'c>(
        &self,
        conn: &'c mut PgConnection,
    ) -> Result<Transaction<'c, Postgres>, sqlx::Error> {
        conn.begin_with(AssertSqlSafe(Arc::clone(&self.begin)))
            .await
    }

    /// The pool that reads go to. It connects when it is first used.
    #[must_use]
    pub fn pool(&self, size: u32) -> PgPool {
        let pool = PgPoolOptions::new()
            .max_connections(size)
            .acquire_timeout(READ_TIMEOUT);
        if !self.behind_pooler {
            // A plan per execution, made for the tables as they are. Planned on
            // an empty table, all indexes that begin with account_id cost the
            // same, and a plan that is kept was seen to read 20,000 charges for
            // one.
            let options = self
                .options
                .clone()
                .options([("plan_cache_mode", "force_custom_plan")]);
            // The ping that sqlx sends at every release has no limit, and on a
            // connection that died silently it would keep its place in the pool
            // until the kernel gives up.
            return pool
                .after_connect(|conn, _| {
                    Box::pin(async move { check_writable(conn).await.map(drop) })
                })
                .after_release(|conn, _| {
                    Box::pin(async move { within(READ_TIMEOUT, conn.ping()).await.map(|()| true) })
                })
                .connect_lazy_with(options);
        }
        // A connection is in a transaction for as long as somebody has it: the
        // statement and its preparation then meet the same session.
        let (new, idle) = (Arc::clone(&self.begin), Arc::clone(&self.begin));
        pool.after_connect(move |conn, _| {
            let begin = AssertSqlSafe(Arc::clone(&new));
            Box::pin(async move { conn.execute(begin).await.map(drop) })
        })
        .before_acquire(move |conn, _| {
            let begin = AssertSqlSafe(Arc::clone(&idle));
            Box::pin(async move { conn.execute(begin).await.map(|_| true) })
        })
        .after_release(|conn, _| {
            let commit = within(READ_TIMEOUT, conn.execute("commit"));
            Box::pin(async move { commit.await.map(|_| true) })
        })
        .connect_lazy_with(self.options.clone())
    }
}
