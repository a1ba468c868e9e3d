//! The way to PostgreSQL: how it is reached, whether it is fit, what each of
//! its errors means, and how a read rides out a restart of it.

mod check;
mod classify;
pub mod replication;
mod server;
mod url;

use std::{borrow::Borrow, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use sqlx::{
    Execute, Postgres, SqlStr,
    error::BoxDynError,
    postgres::{PgArguments, PgStatement},
};
use tokio::time::Instant;
use tracing::warn;

pub use check::{
    PreflightError, Readiness, check, check_layout, check_migrations, check_version, ready,
};
pub use classify::{ErrorClass, describe};
pub(crate) use server::CONNECT_TIMEOUT;
pub use server::{Server, Session, connect};
pub use url::{UrlError, connect_options, server_name};

/// How long one attempt to read may take: shorter than the time that is left
/// of five seconds when an account has been remembered for four.
pub const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs `future` for no longer than `limit`. What struck it is then unknown,
/// so its connection must not be used again.
///
/// # Errors
/// The future's own, or an I/O error of kind `TimedOut`.
pub async fn within<T, E: From<sqlx::Error>>(
    limit: Duration,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(limit, future)
        .await
        .unwrap_or_else(|_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()).into()))
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
/// gives up at `deadline`, in the middle of an attempt if need be.
///
/// # Errors
/// What the last attempt met; it is logged here.
pub async fn read<T, E, F>(
    deadline: Instant,
    mut attempt: impl FnMut() -> F,
) -> Result<T, ErrorClass>
where
    F: Future<Output = Result<T, E>>,
    E: From<sqlx::Error> + Borrow<sqlx::Error>,
{
    let mut pauses = backoff();
    loop {
        let limit = deadline.saturating_duration_since(Instant::now());
        let error = match within(limit.min(READ_TIMEOUT), attempt()).await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let error: &sqlx::Error = error.borrow();
        let class = ErrorClass::of(error);
        let pause = pauses.next().unwrap_or_default();
        if !class.is_retryable_read() || Instant::now() + pause >= deadline {
            warn!(error = %describe(error), "a read failed");
            return Err(class);
        }
        tokio::time::sleep(pause).await;
    }
}

/// A query that is planned for the tables as they are, and not prepared. Costs
/// a round trip, and is for the writer's connection, whose prepared statements
/// keep their plans, and a statement that could be planned with the wrong one
/// of two indexes while its table is empty.
pub(crate) struct NonPersistent<Q>(pub(crate) Q);

impl<'q, Q: Execute<'q, Postgres>> Execute<'q, Postgres> for NonPersistent<Q> {
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
pub(crate) fn corrupt_column(column: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode {
        index: column.to_owned(),
        source: "not a value that this release writes".into(),
    }
}

/// The index into a slice that `with ordinality` counted from 1.
pub(crate) fn position(ordinality: i64) -> usize {
    usize::try_from(ordinality - 1).expect("ordinality counts from 1")
}
