//! The way to PostgreSQL: what every connection of the service is set to, what
//! has to be true of the server, and what each of its errors means.

use std::{str::FromStr, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use sqlx::{
    Connection, Execute, PgConnection, PgPool, Postgres, SqlStr,
    error::BoxDynError,
    migrate::Migrate,
    postgres::{PgArguments, PgConnectOptions, PgPoolOptions, PgStatement},
};
use tokio::time::Instant;
use tracing::warn;

use crate::MIGRATOR;

/// What every session of the service starts with. They ride in the
/// connection's start packet and so cost no round trip.
///
/// The time-outs bound how long a replica that vanished or stands still can
/// hold a key, to about five seconds, and how long a batch can wait for a lock
/// that nobody of ours holds.
const SESSION: &[(&str, &str)] = &[
    // Shorter than it may be for comfort: a batch that is bisected to find the
    // one command that waits spends it once per level, eight times for 256.
    ("lock_timeout", "250ms"),
    ("statement_timeout", "3s"),
    ("idle_in_transaction_session_timeout", "5s"),
    // A client that is gone is noticed in the middle of a statement too.
    ("client_connection_check_interval", "1s"),
    ("tcp_keepalives_idle", "2"),
    ("tcp_keepalives_interval", "1"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "5s"),
    // A role's default of repeatable read would turn every lost claim into a
    // serialization failure.
    ("default_transaction_isolation", "read committed"),
    // No statement of ours needs to read a table from end to end, but one that
    // was planned while the table was empty would, and a prepared one keeps its
    // plan while the table grows. 838 ms instead of 0.9 for 64 keys were measured.
    ("enable_seqscan", "off"),
];

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one attempt to read may take: shorter than the time that is left
/// of five seconds when an account has been remembered for four.
pub const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// The options for a connection to `url`.
///
/// # Errors
/// If the URL is none, without repeating it: it holds a password.
pub fn connect_options(url: &str) -> Result<PgConnectOptions, sqlx::Error> {
    PgConnectOptions::from_str(url).map(|options| options.application_name("payonce"))
}

/// The same with the settings of the service's sessions, which bound how long
/// a statement may take. A migration or a command of an operator goes without.
#[must_use]
pub fn for_service(options: PgConnectOptions) -> PgConnectOptions {
    options.options(SESSION.iter().copied())
}

/// The pool that reads go to. It connects when it is first used.
#[must_use]
pub fn pool(options: PgConnectOptions, size: u32) -> PgPool {
    // A plan per execution, made for the tables as they are. Planned on an empty
    // table, all indexes that begin with account_id cost the same, and a plan
    // that is kept was seen to read 20,000 charges for one.
    let options = options.options([("plan_cache_mode", "force_custom_plan")]);
    PgPoolOptions::new()
        .max_connections(size)
        .acquire_timeout(READ_TIMEOUT)
        .connect_lazy_with(options)
}

/// One connection, or an error within two seconds.
///
/// # Errors
/// What went wrong; a time-out is an I/O error.
pub async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    within(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await
}

/// Runs `future` for no longer than `limit`. What struck it is then unknown,
/// so its connection must not be used again.
///
/// # Errors
/// The future's own, or an I/O error of kind `TimedOut`.
pub async fn within<T>(
    limit: Duration,
    future: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    tokio::time::timeout(limit, future)
        .await
        .unwrap_or_else(|_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())))
}

/// What an error of the database means for whoever met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The connection or the moment was bad: the same again on a new connection.
    Passing,
    /// Disk or memory are short: nothing that we send again helps.
    Exhausted,
    /// A statement or a lock took too long: something in the batch waits.
    TimedOut,
    /// Nobody can log in, or the tables are not there: not ready.
    Misconfigured,
    /// The database will not have this data, or there is a bug of ours.
    Refused,
}

impl Trouble {
    /// Reads SQLSTATE (PostgreSQL's documentation, appendix A).
    #[must_use]
    pub fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(error) => Self::of_sqlstate(&error.code().unwrap_or_default()),
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => Self::Passing,
            _ => Self::Refused,
        }
    }

    fn of_sqlstate(code: &str) -> Self {
        match code {
            // Serialization, unknown completion, deadlock; a stale plan; a
            // session that was idle too long; too many connections; a server
            // that became read-only, as after a failover; one that shuts down,
            // crashed, or is not up yet.
            "40001" | "40003" | "40P01" | "0A000" | "25P03" | "53300" | "25006" | "57P01"
            | "57P02" | "57P03" | "57P04" | "57P05" => Self::Passing,
            "55P03" | "57014" => Self::TimedOut,
            "53100" | "53200" | "58030" => Self::Exhausted,
            "3D000" | "42P01" | "42501" => Self::Misconfigured,
            _ if code.starts_with("08") => Self::Passing,
            _ if code.starts_with("28") => Self::Misconfigured,
            _ => Self::Refused,
        }
    }
}

/// The error for a log. What the database says of data that it refuses repeats
/// the data, so of that only the state and the constraint's name are told.
#[must_use]
pub fn describe(error: &sqlx::Error) -> String {
    let sqlx::Error::Database(database) = error else {
        return error.to_string();
    };
    let code = database.code().unwrap_or_default();
    if code.starts_with("22") || code.starts_with("23") {
        let constraint = database.constraint().unwrap_or("-");
        format!("SQLSTATE {code}, constraint {constraint}")
    } else {
        format!("SQLSTATE {code}: {}", database.message())
    }
}

/// Pauses between attempts: from 10 ms to half a second, with jitter, without end.
pub fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(10))
        .with_max_delay(Duration::from_millis(500))
        .with_jitter()
        .without_max_times()
        .build()
}

/// Runs a read until it succeeds, rides out a restart of the database, and
/// gives up at `deadline`.
///
/// # Errors
/// What the last attempt met; it is logged here.
pub async fn read<T, F>(deadline: Instant, mut attempt: impl FnMut() -> F) -> Result<T, Trouble>
where
    F: Future<Output = Result<T, sqlx::Error>>,
{
    let mut pauses = backoff();
    loop {
        let error = match within(READ_TIMEOUT, attempt()).await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let trouble = Trouble::of(&error);
        let pause = pauses.next().unwrap_or_default();
        let again = matches!(trouble, Trouble::Passing | Trouble::TimedOut);
        if !again || Instant::now() + pause >= deadline {
            warn!(error = %describe(&error), "a read failed");
            return Err(trouble);
        }
        tokio::time::sleep(pause).await;
    }
}

/// A query that is planned for the tables as they are, and not prepared. Costs
/// a round trip, and is for the writer's connection, whose prepared statements
/// keep their plans, and a statement that could be planned with the wrong one
/// of two indexes while its table is empty.
pub(crate) struct Unprepared<Q>(pub(crate) Q);

impl<'q, Q: Execute<'q, Postgres>> Execute<'q, Postgres> for Unprepared<Q> {
    fn sql(self) -> SqlStr {
        self.0.sql()
    }

    fn statement(&self) -> Option<&PgStatement> {
        self.0.statement()
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, BoxDynError> {
        self.0.take_arguments()
    }

    fn persistent(&self) -> bool {
        false
    }
}

/// The error for a column that holds what no release of ours wrote there.
pub(crate) fn unreadable(column: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode {
        index: column.to_owned(),
        source: "not a value that this release writes".into(),
    }
}

/// The index into a slice that `with ordinality` counted from 1.
pub(crate) fn position(ordinality: i64) -> usize {
    usize::try_from(ordinality - 1).expect("ordinality counts from 1")
}

/// Why a server is not one to serve from.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// It could not be asked.
    #[error("cannot reach PostgreSQL: {}", describe(.0))]
    Unreachable(sqlx::Error),
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
    /// A crash could lose what was acknowledged, or nothing can be written.
    #[error("PostgreSQL runs with {setting}, and {consequence}")]
    Unsafe {
        /// The setting as it is.
        setting: &'static str,
        /// What could happen.
        consequence: &'static str,
    },
    /// Something between us and the server drops our settings.
    #[error(
        "the session setting {name} is not in force (it is {actual}); a pooler in between has to pass the `options` start parameter on"
    )]
    SettingIgnored {
        /// Which one.
        name: &'static str,
        /// What the server says it is.
        actual: String,
    },
}

impl From<sqlx::Error> for Unfit {
    fn from(error: sqlx::Error) -> Self {
        Self::Unreachable(error)
    }
}

/// Asks the server whether what we promise can be kept on it.
///
/// # Errors
/// The first thing that is in the way.
pub async fn check(conn: &mut PgConnection) -> Result<(), Unfit> {
    check_durability(conn).await?;
    check_session(conn).await?;
    check_migrations(conn).await
}

async fn check_durability(conn: &mut PgConnection) -> Result<(), Unfit> {
    let server = sqlx::query!(
        r#"
        select
            current_setting('fsync') = 'off' as "no_fsync!",
            current_setting('full_page_writes') = 'off' as "no_full_page_writes!",
            current_setting('synchronous_commit') as "synchronous_commit!",
            pg_is_in_recovery() as "in_recovery!"
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
    ];
    for (met, setting, consequence) in unsafe_settings {
        if met {
            return Err(Unfit::Unsafe {
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

async fn check_session(conn: &mut PgConnection) -> Result<(), Unfit> {
    for &(name, expected) in SESSION {
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
            return Err(Unfit::SettingIgnored {
                name,
                actual: setting.actual,
            });
        }
    }
    Ok(())
}

/// Says how many migrations the database lacks.
///
/// # Errors
/// [`Unfit::NotMigrated`], or that it could not be asked.
pub async fn check_migrations(conn: &mut PgConnection) -> Result<(), Unfit> {
    let total = MIGRATOR.iter().count();
    let applied = match conn.list_applied_migrations("_sqlx_migrations").await {
        Ok(applied) => applied,
        Err(sqlx::migrate::MigrateError::Execute(error))
            if Trouble::of(&error) == Trouble::Misconfigured =>
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
        return Err(Unfit::NotMigrated { missing, total });
    }
    Ok(())
}

/// Whether the database can be written to now, as the readiness probe asks it.
///
/// # Errors
/// What the database said; also if a table or a privilege is missing.
pub async fn ready(pool: &PgPool) -> Result<bool, sqlx::Error> {
    let mut conn = pool.acquire().await?;
    sqlx::query_scalar!(
        r#"
        select (not pg_is_in_recovery()
            and has_table_privilege('idempotency_keys', 'insert')
            and has_table_privilege('charges', 'insert')
            and has_table_privilege('api_keys', 'select')) as "ready!"
        "#
    )
    .fetch_one(&mut *conn)
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_of_the_table_is_told_apart() {
        for (trouble, codes) in [
            (
                Trouble::Passing,
                &[
                    "08000", "08006", "40001", "40003", "40P01", "57P01", "57P02", "57P03",
                    "57P04", "57P05", "53300", "25006", "25P03", "0A000",
                ][..],
            ),
            (Trouble::Exhausted, &["53100", "53200", "58030"]),
            (Trouble::TimedOut, &["55P03", "57014"]),
            (
                Trouble::Refused,
                &[
                    "22021", "22P02", "23505", "23514", "21000", "42601", "XX000",
                ],
            ),
            (
                Trouble::Misconfigured,
                &["28P01", "28000", "3D000", "42P01", "42501"],
            ),
        ] {
            for code in codes {
                assert_eq!(Trouble::of_sqlstate(code), trouble, "{code}");
            }
        }
    }

    #[test]
    fn a_broken_url_is_not_repeated() {
        let error = connect_options("postgres://user:hunter2@host:port/db").unwrap_err();
        assert!(!describe(&error).contains("hunter2"));
    }
}
