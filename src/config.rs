//! Settings: flags, or the environment. `.env.example` mirrors this file.

use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};

use crate::{
    http::{DuplicateGuard, Keyless, command::WAIT_MAX},
    idempotency::{Change, Rules},
};

/// Where the data is.
#[derive(Debug, Clone, Args)]
pub struct Database {
    /// PostgreSQL, 15 or later: postgres://user:password@host:port/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: String,
}

/// How the service runs.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Where the data is.
    #[command(flatten)]
    pub database: Database,

    /// Where to listen; 0.0.0.0:8080 for all interfaces
    #[arg(
        long,
        env = "LISTEN_ADDR",
        default_value = "127.0.0.1:8080",
        value_name = "HOST:PORT"
    )]
    pub listen_addr: String,

    /// How long keys are kept.
    #[command(flatten)]
    pub rules: RuleChanges,

    /// What becomes of a POST without an Idempotency-Key: fingerprint lets it
    /// through once, and refuses the same again for 30s
    #[arg(long, env = "KEYLESS", value_enum, default_value = "refuse")]
    pub keyless: Keyless,

    /// What becomes of a charge of the same customer, amount and currency under
    /// another key, a moment after the first
    #[arg(long, env = "DUPLICATE_GUARD", value_enum, default_value = "off")]
    pub duplicate_guard: DuplicateGuard,

    /// How long that moment is
    #[arg(long, env = "DUPLICATE_GUARD_WINDOW", default_value = "5m", value_parser = positive, value_name = "DURATION")]
    pub duplicate_guard_window: Duration,

    /// How long a duplicate of a running request waits before it gets 409; at
    /// most 10s. A client can ask for another time by `Prefer: wait=N`
    #[arg(long, env = "DUPLICATE_WAIT", default_value = "2s", value_parser = wait, value_name = "DURATION")]
    pub duplicate_wait: Duration,

    /// Most charges in one transaction
    #[arg(long, env = "BATCH_MAX", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=4096), value_name = "N")]
    pub batch_max: u16,

    /// Most charges that wait or are being written; more get 503 at once
    #[arg(long, env = "QUEUE_MAX", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N")]
    pub queue_max: u32,

    /// Connections for lists and look-ups of keys; for each 32 requests may wait, more
    /// get 503 at once. Writes and charges by id have two more each, API keys three
    #[arg(long, env = "POOL_SIZE", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub pool_size: u32,

    /// Most requests of an account per second, and at once, on this replica; more
    /// get 429. 0 is no limit
    #[arg(long, env = "RATE_LIMIT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000), value_name = "N")]
    pub rate_limit: u32,

    /// Most connections of clients; more get 503 at once
    #[arg(long, env = "CONNECTIONS_MAX", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N")]
    pub connections_max: u32,

    /// Most unknown API keys per second from one address; more of them get 429, and
    /// keys that were valid before none. 0 is no limit
    #[arg(long, env = "AUTH_FAILURE_LIMIT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1_000_000), value_name = "N")]
    pub auth_failure_limit: u32,

    /// Set to true if `DATABASE_URL` leads to PgBouncer in transaction mode, or
    /// a pooler like it; costs a little speed
    #[arg(long, env = "TRANSACTION_POOLER", default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set, value_name = "BOOL")]
    pub transaction_pooler: bool,

    /// How often expired answers are purged
    #[arg(long, env = "PURGE_INTERVAL", default_value = "1m", value_parser = positive, value_name = "DURATION")]
    pub purge_interval: Duration,

    /// How long running requests may take to finish after SIGTERM
    #[arg(long, env = "SHUTDOWN_TIMEOUT", default_value = "15s", value_parser = positive, value_name = "DURATION")]
    pub shutdown_timeout: Duration,
}

/// Rules that differ from the defaults.
#[derive(Debug, Clone, Args)]
pub struct RuleChanges {
    /// How long a key is kept, and what a duplicate gets: webhook=14d or
    /// form=2h,refuse; several with spaces between. `payonce rules` shows them
    #[arg(
        long = "rule",
        env = "RULES",
        value_delimiter = ' ',
        value_name = "RULE"
    )]
    changes: Vec<Change>,
}

impl RuleChanges {
    /// The rules with the changes.
    ///
    /// # Errors
    /// If two changes are about the same scenario.
    pub fn rules(&self) -> Result<Rules, String> {
        Rules::with(&self.changes)
    }
}

/// How log lines are written, to standard error. `RUST_LOG` says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The longest time that a setting may name: more is a slip, and would not fit
/// PostgreSQL's timestamps at some point.
const DURATION_MAX: Duration = Duration::from_hours(10 * 366 * 24);

pub(crate) fn positive(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it like 24h, 90s or 250ms"))?;
    if duration.is_zero() || duration > DURATION_MAX {
        return Err("it has to be more than 0 and at most 10 years".to_owned());
    }
    Ok(duration)
}

fn wait(text: &str) -> Result<Duration, String> {
    // Not to wait at all is a choice, if an impatient one.
    if matches!(text, "0" | "0s" | "0ms") {
        return Ok(Duration::ZERO);
    }
    let duration = positive(text)?;
    if duration > WAIT_MAX {
        return Err(format!("it has to be at most {}s", WAIT_MAX.as_secs()));
    }
    Ok(duration)
}
