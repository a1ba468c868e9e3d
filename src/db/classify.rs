//! What the errors of PostgreSQL mean for whoever meets them.

use sqlx::{error::DatabaseError, postgres::PgDatabaseError};

/// What an error of the database means for whoever met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The connection or the moment was bad: the same again on a new connection.
    Transient,
    /// Disk or memory are short: nothing that we send again helps.
    ResourceExhausted,
    /// The lock on a table was not to be had in time: somebody changes the
    /// tables, and every command waits for them.
    TableLocked,
    /// A row was not to be had in time: something in the batch waits for
    /// another transaction.
    RowLocked,
    /// A statement took too long.
    TimedOut,
    /// Nobody can log in, or the tables are not there: not ready.
    Misconfigured,
    /// The database will not have this data, or there is a bug of ours.
    Rejected,
}

impl ErrorClass {
    /// Reads SQLSTATE (PostgreSQL's documentation, appendix A).
    #[must_use]
    pub fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(error) => {
                match Self::of_sqlstate(&error.code().unwrap_or_default()) {
                    // PostgreSQL names the row in the error's context, and there is
                    // none where a table's lock was waited for.
                    Self::RowLocked if !has_context(&**error) => Self::TableLocked,
                    class => class,
                }
            }
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => Self::Transient,
            _ => Self::Rejected,
        }
    }

    /// Whether a read does well to be tried again.
    #[must_use]
    pub fn is_retryable_read(self) -> bool {
        matches!(
            self,
            Self::Transient | Self::TableLocked | Self::RowLocked | Self::TimedOut
        )
    }

    fn of_sqlstate(code: &str) -> Self {
        match code {
            // A rollback of the server's making (serialization, unknown
            // completion, deadlock); a stale plan; a statement that is not
            // prepared here, or is already; a session or a transaction that
            // took too long, or failed before; too many connections; a server
            // that became read-only, as after a failover; one that shuts down,
            // crashed, or is not up yet.
            "40000" | "40001" | "40003" | "40P01" | "0A000" | "26000" | "42P05" | "25P02"
            | "25P03" | "25P04" | "53300" | "25006" | "57P01" | "57P02" | "57P03" | "57P04"
            | "57P05" => Self::Transient,
            "55P03" => Self::RowLocked,
            "57014" => Self::TimedOut,
            "53100" | "53200" | "53400" | "58030" => Self::ResourceExhausted,
            // The database, schema, table, column or function is not there, or
            // not ours.
            "3D000" | "3F000" | "42P01" | "42703" | "42883" | "42501" => Self::Misconfigured,
            _ if code.starts_with("08") => Self::Transient,
            _ if code.starts_with("28") => Self::Misconfigured,
            _ => Self::Rejected,
        }
    }
}

fn has_context(error: &dyn DatabaseError) -> bool {
    error
        .try_downcast_ref::<PgDatabaseError>()
        .is_some_and(|error| error.r#where().is_some())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_of_the_table_is_told_apart() {
        for (class, codes) in [
            (
                ErrorClass::Transient,
                &[
                    "08000", "08006", "40000", "40001", "40003", "40P01", "57P01", "57P02",
                    "57P03", "57P04", "57P05", "53300", "25006", "25P02", "25P03", "25P04",
                    "26000", "42P05", "0A000",
                ][..],
            ),
            (
                ErrorClass::ResourceExhausted,
                &["53100", "53200", "53400", "58030"],
            ),
            (ErrorClass::RowLocked, &["55P03"]),
            (ErrorClass::TimedOut, &["57014"]),
            (
                ErrorClass::Rejected,
                &[
                    "22021", "22P02", "23505", "23514", "21000", "42601", "XX000",
                ],
            ),
            (
                ErrorClass::Misconfigured,
                &[
                    "28P01", "28000", "3D000", "3F000", "42P01", "42501", "42703", "42883",
                ],
            ),
        ] {
            for code in codes {
                assert_eq!(ErrorClass::of_sqlstate(code), class, "{code}");
            }
        }
    }
}
