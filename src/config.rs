//! Settings: flags, or the environment. `.env.example` mirrors this file.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{ArgAction, Args, ValueEnum};
use sqlx::postgres::PgConnectOptions;

use crate::{
    db,
    http::{DuplicateGuard, Keyless, command::WAIT_MAX},
    idempotency::{RuleOverride, Rules},
};

/// A setting that is missing or cannot be used, in one line without its value.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingError(String);

/// Where the data is.
#[derive(Debug, Clone, Args)]
pub struct Database {
    /// PostgreSQL, 15 or later: postgres://user:password@host:port/database
    // Not required for clap, and not parsed by it: it would repeat the password.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
}

impl Database {
    /// How to connect to it.
    ///
    /// # Errors
    /// If it is not set, or leads to no database.
    pub fn connect_options(&self) -> Result<PgConnectOptions, SettingError> {
        let url = self.database_url.as_ref().ok_or_else(|| {
            SettingError(
                "DATABASE_URL is not set: set it, or --database-url, to where PostgreSQL is, \
                 like postgres://user:password@127.0.0.1:5432/payonce"
                    .to_owned(),
            )
        })?;
        db::connect_options(url)
            .map_err(|error| SettingError(format!("DATABASE_URL cannot be used: {error}")))
    }
}

/// Where the API key of a client is. Never on the command line, which everybody
/// on the machine can read.
#[derive(Debug, Clone, Args)]
pub struct ApiKeySource {
    /// A file that holds the API key; - is standard input. Without it the key is
    /// taken from the variable `PAYONCE_API_KEY`
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

/// Longer than any API key.
const API_KEY_FILE_MAX: u64 = 4096;

impl ApiKeySource {
    /// The API key.
    ///
    /// # Errors
    /// If there is none, or none that could be sent.
    pub fn read(&self) -> Result<String, SettingError> {
        let (api_key, place) = match &self.api_key_file {
            Some(file) => (read_api_key(file)?, "the file of --api-key-file"),
            None => (
                std::env::var("PAYONCE_API_KEY").unwrap_or_default(),
                "PAYONCE_API_KEY",
            ),
        };
        let api_key = api_key.trim();
        if api_key.is_empty() && self.api_key_file.is_none() {
            return Err(SettingError(
                "PAYONCE_API_KEY is not set: set it to the API key, or name a file that holds it \
                 with --api-key-file (`payonce account create NAME` makes one)"
                    .to_owned(),
            ));
        }
        if api_key.is_empty() || !api_key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(SettingError(format!(
                "{place} has to hold one API key, like sk_test_..., and nothing else"
            )));
        }
        Ok(api_key.to_owned())
    }
}

fn read_api_key(file: &Path) -> Result<String, SettingError> {
    if file.to_str().is_some_and(|name| name.starts_with("sk_")) {
        return Err(SettingError(
            "--api-key-file takes the name of a file, not the API key".to_owned(),
        ));
    }
    let input: std::io::Result<Box<dyn Read>> = if file == Path::new("-") {
        Ok(Box::new(std::io::stdin()))
    } else {
        File::open(file).map(|file| Box::new(file) as Box<dyn Read>)
    };
    let mut text = String::new();
    input
        .and_then(|input| input.take(API_KEY_FILE_MAX).read_to_string(&mut text))
        .map_err(|error| {
            SettingError(format!(
                "cannot read the API key from {}: {error}",
                file.display()
            ))
        })?;
    Ok(text)
}

/// Takes what `.env`, here or in a directory above, has for variables that are
/// not set. No thread may have been started, since this changes the environment.
///
/// # Errors
/// Where the file cannot be read, without the line: it may hold a password.
pub fn load_env_file() -> Result<(), SettingError> {
    let here = std::env::current_dir().unwrap_or_default();
    let Some(file) = here
        .ancestors()
        .map(|directory| directory.join(".env"))
        .find(|file| file.is_file())
    else {
        return Ok(());
    };
    let failed =
        |error: std::io::Error| SettingError(format!("cannot read {}: {error}", file.display()));
    match dotenvy::from_path(&file) {
        Ok(()) => Ok(()),
        Err(dotenvy::Error::Io(error)) => Err(failed(error)),
        Err(_) => {
            let text = std::fs::read_to_string(&file).map_err(failed)?;
            let text = text.trim_start_matches('\u{feff}');
            Err(SettingError(format!(
                "{}, line {}: a line has to be NAME=value, and a value with spaces needs quotes, \
                 like RULES=\"payment=48h webhook=14d\"",
                file.display(),
                broken_line(text),
            )))
        }
    }
}

/// The number of the first line that cannot be read: the one after the longest
/// beginning that can be. (A beginning may end within quotes, a longer one not.)
fn broken_line(text: &str) -> usize {
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let can_be_read = |count: &usize| {
        let beginning = lines[..*count].concat();
        dotenvy::from_read_iter(beginning.as_bytes()).all(|line| line.is_ok())
    };
    1 + (0..lines.len()).rev().find(can_be_read).unwrap_or(0)
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
    changes: Vec<RuleOverride>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_cannot_be_read_is_named() {
        for (text, line) in [
            ("RULES=payment=48h webhook=14d", 1),
            ("# RULES=a b\nA=1\n\nRULES=a b\nB=2\n", 4),
            ("A=\"1\n2\n3\"\nB=a b\nC=\"4\n5\"\n", 4),
            ("A=1\nB=\"open\nC=2\n", 2),
            ("A=1\n=2\n", 2),
        ] {
            assert_eq!(broken_line(text), line, "{text}");
        }
    }
}
