//! A transaction on a connection of the service's pool.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, PgConnection, PgPool, Postgres, SqlSafeStr, pool::PoolConnection,
    postgres::PgTransactionManager,
};
// For owning a transaction without giving its connection back when it is dropped,
// which sqlx's own type does. sqlx does not export the trait.
use sqlx_core::transaction::TransactionManager;
use tracing::Instrument;

use crate::db::{replication, within};

/// How long a COMMIT that nobody waits for any more keeps its place in the pool.
///
/// COMMIT can wait for a synchronous standby for as long as that is away, and its
/// session lives on in the server when its connection is closed. A pool that
/// opened another connection each time would use up those of the server.
const COMMIT_MAX: Duration = Duration::from_mins(5);

/// A pooled connection with a transaction on it.
///
/// The connection goes back to the pool only when the server has confirmed the
/// end of the transaction. Wherever a future is dropped in the middle (a time
/// limit, a handler that panics) or an error leaves the transaction's state open
/// to doubt, the connection is closed: sqlx 0.9.0 loses count of a `begin` that is
/// cancelled (sqlx issue 4385), and the next user of the connection would write
/// into a transaction that nobody commits.
pub(super) struct Session {
    conn: Option<PoolConnection<Postgres>>,
    /// Whether COMMIT waits for standbys, and so has to be watched.
    pub(super) has_standbys: bool,
}

const LIVES: &str = "it is taken only by what consumes the session";

impl Session {
    /// Takes a connection, and begins with these statements.
    pub(super) async fn begin(pool: &PgPool, statements: String) -> Result<Self, sqlx::Error> {
        let mut session = Self {
            conn: Some(pool.acquire().await?),
            has_standbys: false,
        };
        let statements = AssertSqlSafe(statements).into_sql_str();
        PgTransactionManager::begin(&mut session, Some(statements)).await?;
        Ok(session)
    }

    /// How many transactions are open, one in another, as far as sqlx knows: 1 is
    /// the layer's own, 0 means that it is lost.
    pub(super) fn depth(&self) -> usize {
        PgTransactionManager::get_transaction_depth(self)
    }

    /// Commits. The COMMIT goes on if this future is dropped. One whose wait for a
    /// standby was cancelled waits anew.
    pub(super) async fn commit(mut self) -> Result<(), sqlx::Error> {
        let commit = async move {
            let commit = async {
                if !self.has_standbys {
                    return PgTransactionManager::commit(&mut self).await;
                }
                if replication::warned(PgTransactionManager::commit(&mut self)).await? {
                    replication::wait_for_standby(&mut self).await?;
                }
                Ok(())
            };
            within(COMMIT_MAX, commit).await?;
            self.release();
            Ok(())
        };
        let commit = tokio::spawn(commit.in_current_span()).await;
        commit.unwrap_or(Err(sqlx::Error::WorkerCrashed))
    }

    /// Rolls everything back.
    pub(super) async fn roll_back(mut self) -> Result<(), sqlx::Error> {
        PgTransactionManager::rollback(&mut self).await?;
        self.release();
        Ok(())
    }

    /// Back to the pool, if nothing is open.
    fn release(mut self) {
        if self.depth() == 0 {
            drop(self.conn.take());
        }
    }
}

impl Deref for Session {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.conn.as_ref().expect(LIVES)
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.conn.as_mut().expect(LIVES)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(mut conn) = self.conn.take() {
            conn.close_on_drop();
        }
    }
}
