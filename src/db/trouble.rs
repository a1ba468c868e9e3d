//! What the errors of PostgreSQL mean for whoever meets them.

/// What an error of the database means for whoever met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The connection or the moment was bad: the same again on a new connection.
    Passing,
    /// Disk or memory are short: nothing that we send again helps.
    Exhausted,
    /// A lock was not to be had in time: something in the batch waits for
    /// another transaction.
    Blocked,
    /// A statement took too long.
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
            "55P03" => Self::Blocked,
            "57014" => Self::TimedOut,
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
            (Trouble::Blocked, &["55P03"]),
            (Trouble::TimedOut, &["57014"]),
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
}
