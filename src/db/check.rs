//! Whether a server is one that our promises can be kept on.

use sqlx::{PgConnection, PgPool, migrate::Migrate};
use tracing::warn;

use super::{ErrorClass, Server, describe, replication, server::SESSION};
use crate::MIGRATOR;

/// Why a server is not one to serve from.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// There is no connection to it.
    #[error("cannot connect to PostgreSQL at {server}: {}", describe(.error))]
    Unreachable {
        /// Host and port, or the socket.
        server: String,
        /// What went wrong.
        error: sqlx::Error,
    },
    /// It could not be asked.
    #[error("PostgreSQL could not be asked: {}", describe(.0))]
    Unasked(sqlx::Error),
    /// Older than what payonce is tested with.
    #[error("PostgreSQL {0} is too old: payonce needs PostgreSQL {OLDEST} or later")]
    TooOld(String),
    /// A pooler does not take our session's settings.
    #[error(
        "there is a pooler before PostgreSQL that refuses our session settings: behind PgBouncer in transaction mode start with --transaction-pooler (TRANSACTION_POOLER=true); commands other than serve need a direct DATABASE_URL"
    )]
    BehindPooler,
    /// Tables are missing.
    #[error(
        "the database lacks {missing} of {total} migrations; run `payonce migrate` (or `sqlx migrate run`) first"
    )]
    NotMigrated {
        /// How many.
        missing: usize,
        /// Of how many.
        total: usize,
    },
    /// What was acknowledged could be lost, or nothing can be written.
    #[error("PostgreSQL runs with {setting}, and {consequence}")]
    Unsafe {
        /// The setting as it is.
        setting: &'static str,
        /// What could happen.
        consequence: &'static str,
    },
    /// A table is laid out in a way that our statements are wrong on.
    #[error(
        "the table {table} is {layout}: payonce needs plain tables, as its migrations make them"
    )]
    Layout {
        /// Which one.
        table: String,
        /// Partitioned, inherited from, or distributed.
        layout: &'static str,
    },
    /// Something between us and the server drops our settings.
    #[error(
        "the session setting {name} is not in force (it is {actual}): a pooler in between drops it; behind PgBouncer in transaction mode start with --transaction-pooler (TRANSACTION_POOLER=true)"
    )]
    SettingIgnored {
        /// Which one.
        name: &'static str,
        /// What the server says it is.
        actual: String,
    },
}

/// The oldest version of PostgreSQL that is supported.
const OLDEST: u32 = 15;

impl PreflightError {
    /// Why there is no connection to `server`.
    #[must_use]
    pub fn unreachable(server: String, error: sqlx::Error) -> Self {
        // PgBouncer's word for what PostgreSQL takes.
        let refused = error
            .as_database_error()
            .map(|e| e.message().contains("unsupported startup parameter"));
        if refused == Some(true) {
            Self::BehindPooler
        } else {
            Self::Unreachable { server, error }
        }
    }

    /// The database's error, where it is one.
    #[must_use]
    pub fn database_error(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Unreachable { error, .. } | Self::Unasked(error) => Some(error),
            _ => None,
        }
    }
}

impl From<sqlx::Error> for PreflightError {
    fn from(error: sqlx::Error) -> Self {
        Self::Unasked(error)
    }
}

/// Asks the server whether what we promise can be kept on it.
///
/// # Errors
/// The first thing that is in the way.
pub async fn check(server: &Server) -> Result<(), PreflightError> {
    let mut conn = server
        .connect_to_any()
        .await
        .map_err(|error| PreflightError::unreachable(server.name(), error))?;
    check_version(&conn)?;
    // In a transaction, since behind a pooler the settings hold there alone.
    let mut transaction = server.begin(&mut conn).await?;
    check_durability(&mut transaction).await?;
    check_session(server, &mut transaction).await?;
    check_layout(&mut transaction).await?;
    check_migrations(&mut transaction).await?;
    transaction.rollback().await?;
    Ok(())
}

/// Asks for PostgreSQL 15 or later. The server tells its version when a
/// connection is made, so that this costs no round trip.
///
/// # Errors
/// [`PreflightError::TooOld`].
pub fn check_version(conn: &PgConnection) -> Result<(), PreflightError> {
    match conn.server_version_num() {
        Some(number) if number < OLDEST * 10_000 => Err(PreflightError::TooOld(format!(
            "{}.{}",
            number / 10_000,
            number % 10_000
        ))),
        _ => Ok(()),
    }
}

async fn check_durability(conn: &mut PgConnection) -> Result<(), PreflightError> {
    let server = sqlx::query!(
        r#"
        select
            current_setting('fsync') = 'off' as "no_fsync!",
            current_setting('full_page_writes') = 'off' as "no_full_page_writes!",
            current_setting('synchronous_commit') as "synchronous_commit!",
            current_setting('server_encoding') <> 'UTF8' as "other_encoding!",
            pg_is_in_recovery() as "in_recovery!",
            current_setting('transaction_read_only') = 'on' as "read_only!"
        "#
    )
    .fetch_one(conn)
    .await?;
    let unsafe_settings = [
        (
            server.no_fsync,
            "fsync=off",
            "a crash of its machine would lose or break charges",
        ),
        (
            server.no_full_page_writes,
            "full_page_writes=off",
            "a crash of its machine could break pages of charges",
        ),
        (
            server.in_recovery,
            "recovery in progress",
            "a standby takes no charges: point DATABASE_URL at the primary",
        ),
        (
            server.read_only,
            "default_transaction_read_only=on",
            "takes no charges",
        ),
        (
            server.other_encoding,
            "a database encoding other than UTF8",
            "could not keep every answer as it was given",
        ),
    ];
    for (met, setting, consequence) in unsafe_settings {
        if met {
            return Err(PreflightError::Unsafe {
                setting,
                consequence,
            });
        }
    }
    if matches!(server.synchronous_commit.as_str(), "off" | "local") {
        warn!(
            synchronous_commit = server.synchronous_commit,
            "a crash or a failover may lose charges that were acknowledged"
        );
    }
    Ok(())
}

async fn check_session(server: &Server, conn: &mut PgConnection) -> Result<(), PreflightError> {
    for &(name, expected, of_transactions) in SESSION {
        if server.behind_pooler && !of_transactions {
            continue;
        }
        // Compared by the server, which alone knows that 2 is 2s. The left side
        // is what is in force, the right side what the start packet asked for.
        let setting = sqlx::query!(
            r#"
            select current_setting($1) as "actual!",
                current_setting($1) = set_config($1, $2, true) as "same!"
            "#,
            name,
            expected,
        )
        .fetch_one(&mut *conn)
        .await?;
        if !setting.same {
            return Err(PreflightError::SettingIgnored {
                name,
                actual: setting.actual,
            });
        }
    }
    Ok(())
}

/// Refuses tables on which a row's `ctid` does not name one row: partitions number
/// their rows each for itself, and a statement that takes a row by its number would hit
/// strangers' rows.
///
/// # Errors
/// [`PreflightError::Layout`], or that it could not be asked.
pub async fn check_layout(conn: &mut PgConnection) -> Result<(), PreflightError> {
    let tables: Vec<(String, bool, bool)> = sqlx::query_as(
        "select relname::text, relkind = 'p' or relispartition,
             exists (select from pg_inherits where inhparent = pg_class.oid)
         from pg_class
         where oid in (to_regclass('idempotency_keys'), to_regclass('charges'), to_regclass('refunds'))
         order by relname",
    )
    .fetch_all(&mut *conn)
    .await?;
    for (table, partitioned, inherited) in tables {
        let layout = match (partitioned, inherited) {
            (true, _) => "partitioned",
            (false, true) => "inherited from",
            (false, false) => continue,
        };
        return Err(PreflightError::Layout { table, layout });
    }
    // Citus keeps its list of distributed tables here.
    let citus: bool =
        sqlx::query_scalar("select to_regclass('pg_catalog.pg_dist_partition') is not null")
            .fetch_one(&mut *conn)
            .await?;
    if citus {
        let table: Option<String> = sqlx::query_scalar(
            "select logicalrel::text from pg_dist_partition
             where logicalrel in ('idempotency_keys'::regclass, 'charges'::regclass, 'refunds'::regclass)
             limit 1",
        )
        .fetch_optional(&mut *conn)
        .await?;
        if let Some(table) = table {
            let layout = "distributed";
            return Err(PreflightError::Layout { table, layout });
        }
    }
    Ok(())
}

/// Says how many migrations the database lacks.
///
/// # Errors
/// [`PreflightError::NotMigrated`], or that it could not be asked.
pub async fn check_migrations(conn: &mut PgConnection) -> Result<(), PreflightError> {
    let total = MIGRATOR.iter().count();
    let applied = match conn.list_applied_migrations("_sqlx_migrations").await {
        Ok(applied) => applied,
        Err(sqlx::migrate::MigrateError::Execute(error))
            if ErrorClass::of(&error) == ErrorClass::Misconfigured =>
        {
            vec![]
        }
        Err(sqlx::migrate::MigrateError::Execute(error)) => return Err(error.into()),
        Err(other) => return Err(sqlx::Error::Migrate(Box::new(other)).into()),
    };
    let missing = MIGRATOR
        .iter()
        .filter(|ours| !applied.iter().any(|theirs| theirs.version == ours.version))
        .count();
    if missing > 0 {
        return Err(PreflightError::NotMigrated { missing, total });
    }
    Ok(())
}

/// What the readiness probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Charges can be made.
    Ready,
    /// The server takes no writes.
    ReadOnly,
    /// A privilege is missing.
    NotPrivileged,
    /// COMMITs wait for a synchronous standby that does not answer.
    StandbyAway,
}

/// Whether the database can be written to now, as the readiness probe asks it.
///
/// # Errors
/// Any database error; also if a table is missing.
pub async fn ready(pool: &PgPool) -> Result<Readiness, sqlx::Error> {
    let mut conn = pool.acquire().await?;
    let found = sqlx::query!(
        r#"
        select current_setting('transaction_read_only') = 'on' as "read_only!",
            has_table_privilege('idempotency_keys', 'insert')
                and has_table_privilege('charges', 'insert')
                and has_table_privilege('api_keys', 'select') as "privileged!"
        "#
    )
    .fetch_one(&mut *conn)
    .await?;
    Ok(if found.read_only {
        Readiness::ReadOnly
    } else if !found.privileged {
        Readiness::NotPrivileged
    } else if replication::stalled(&mut conn).await? {
        Readiness::StandbyAway
    } else {
        Readiness::Ready
    })
}
