//! The commands.

use std::{
    io::{self, Write},
    time::Duration,
};

use chrono::{DateTime, NaiveDate, Utc};
use clap::{
    Arg, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand,
    builder::Resettable,
    error::{ContextKind, ContextValue},
};
use sqlx::{Connection, PgConnection};

use crate::{
    MIGRATOR,
    accounts::{self, ApiKey, NAME_MAX},
    client::{command as charge, health},
    config::{self, ApiKeySource, Database, LogFormat, RuleChanges, Serve, SettingError},
    db,
    http::openapi,
    idempotency::{Key, purge},
    ids::{AccountId, ApiKeyId},
    key_builder::{self, Windowed},
    money::{AMOUNT_MAX, Amount},
    serve, storm,
};

/// A payments service whose charges happen once, however often they are asked for.
///
/// Settings are flags or environment variables; a file `.env` in the working
/// directory is read too. An empty variable counts as unset.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    /// How log lines are written: text, or json for one object a line
    // One line in the help of every command, hence without the list of values.
    #[arg(
        long,
        env = "LOG_FORMAT",
        value_enum,
        default_value = "text",
        hide_possible_values = true,
        value_name = "FORMAT",
        global = true
    )]
    pub log_format: LogFormat,

    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run the service
    Serve(Box<Serve>),
    /// Bring the database's tables up to date
    Migrate(Database),
    /// Ask the service on this machine whether it is ready, as health checks do:
    /// exits with 1 if it does not answer, or cannot reach PostgreSQL
    Health(health::Options),
    /// Manage accounts: merchants, the owners of charges
    #[command(subcommand)]
    Account(AccountTask),
    /// Manage the API keys of accounts
    #[command(subcommand)]
    ApiKey(ApiKeyTask),
    /// Build the idempotency key of an operation; needs no database
    #[command(subcommand)]
    Key(Box<KeyTask>),
    /// Remove expired answers now, until none is left
    Purge(Database),
    /// Show how long keys are kept and what a duplicate gets, by what it is
    Rules(RuleChanges),
    /// Charge once, through a running service
    #[command(after_help = charge::EXIT_CODES)]
    Charge(Box<charge::Options>),
    /// Print the API's description, OpenAPI 3.1
    Openapi,
    /// Attack a running service the way real networks do, and audit it
    #[command(after_help = storm::EXIT_CODES)]
    Storm(Box<storm::Options>),
}

#[derive(Debug, Subcommand)]
enum AccountTask {
    /// Make an account and its first API key, which is shown only now
    Create {
        /// For people, up to 200 characters
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        database: Database,
    },
}

#[derive(Debug, Subcommand)]
enum ApiKeyTask {
    /// Make one more API key for an account; it is shown only now
    Create {
        /// acct_…
        account: AccountId,
        #[command(flatten)]
        database: Database,
    },
    /// List an account's API keys, without their secrets
    List {
        /// acct_…
        account: AccountId,
        #[command(flatten)]
        database: Database,
    },
    /// Revoke an API key; it is dead on every replica within 5 seconds
    Revoke {
        /// ak_…
        api_key_id: ApiKeyId,
        #[command(flatten)]
        database: Database,
    },
    /// Say whose the API key in `PAYONCE_API_KEY` is; fails if it is unknown or revoked
    Check {
        #[command(flatten)]
        database: Database,
        #[command(flatten)]
        api_key: ApiKeySource,
    },
}

#[derive(Debug, Subcommand)]
enum KeyTask {
    /// For a payment: once per order, amount and version
    Payment {
        /// The order's id
        #[arg(long)]
        order: String,
        /// In minor units: cents, yen
        #[arg(long, value_parser = amount, allow_negative_numbers = true, value_name = "N")]
        amount: Amount,
        /// Another for a changed cart, a changed currency, and another card
        /// after a decline
        #[arg(long, default_value_t = 1, value_name = "N")]
        version: u32,
    },
    /// For a form without a key of its own: once per user, form and window of
    /// time; not for money
    Form {
        /// The user's id; it stands in the key, so no address
        #[arg(long)]
        user: String,
        /// The form's name
        #[arg(long)]
        form: String,
        #[command(flatten)]
        window: Window,
    },
    /// For an event that was delivered: once per source and event
    Webhook {
        /// Who sent it, like stripe
        #[arg(long)]
        source: String,
        /// The event's id
        #[arg(long)]
        event: String,
    },
    /// For a message of a queue: once per message
    Message {
        /// The sender's id of it, not the delivery's
        #[arg(long)]
        id: String,
    },
    /// For a mail: once per recipient, template and day
    Email {
        /// The address; the key carries a hash of it
        #[arg(long)]
        recipient: String,
        /// The template's name
        #[arg(long)]
        template: String,
        /// The day it is meant for
        #[arg(long, value_parser = day, value_name = "YYYY-MM-DD")]
        day: NaiveDate,
    },
    /// For what has no shorter name: once per entity, action, data and window of
    /// time; not for money
    Compound {
        /// What it is done to
        #[arg(long)]
        entity: String,
        /// What is done
        #[arg(long)]
        action: String,
        /// What it is done with; the order of fields makes no difference
        #[arg(long, value_name = "JSON")]
        data: String,
        #[command(flatten)]
        window: Window,
    },
    /// A new key, to be stored before the first try
    Mint,
}

#[derive(Debug, Args)]
struct Window {
    /// The window's length, like 10m; tries on both sides of its edge have two keys
    #[arg(long = "window", value_parser = config::positive, value_name = "DURATION")]
    length: Duration,
    /// A moment in it, like 2026-07-01T12:00:00Z; now, unless given
    #[arg(long, value_parser = moment, value_name = "RFC3339")]
    at: Option<DateTime<Utc>>,
    /// Print the key of the window before; claim it together with the current one
    #[arg(long)]
    previous: bool,
}

fn amount(text: &str) -> Result<Amount, String> {
    text.parse()
        .ok()
        .and_then(Amount::new)
        .ok_or_else(|| format!("an amount is a whole number from 1 to {AMOUNT_MAX}"))
}

fn day(text: &str) -> Result<NaiveDate, String> {
    text.parse()
        .ok()
        // chrono takes spaces and missing zeros too.
        .filter(|day: &NaiveDate| day.to_string() == text)
        .ok_or_else(|| "a day is written like 2026-07-01".to_owned())
}

fn moment(text: &str) -> Result<DateTime<Utc>, String> {
    DateTime::parse_from_rfc3339(text)
        .map(|at| at.to_utc())
        .map_err(|_| "a moment is written like 2026-07-01T12:00:00Z".to_owned())
}

fn name(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() || text.chars().count() > NAME_MAX || text.contains('\0') {
        return Err(format!("a name has 1 to {NAME_MAX} characters"));
    }
    Ok(text.to_owned())
}

/// A failure of a command, in one line.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The exit code for a mistake in the command line or a setting, as clap has it.
pub const USAGE: u8 = 2;

/// The exit code of a failed command: 3 if a charge may have been made, 2 if a
/// setting is wrong or the storm came to no verdict, else 1.
#[must_use]
pub fn exit_code(failure: &Failure) -> u8 {
    if failure.is::<charge::Open>() {
        3
    } else if failure.is::<SettingError>() || failure.is::<storm::NoVerdict>() {
        USAGE
    } else {
        1
    }
}

impl Cli {
    /// From the command line and the environment; ends the process on a mistake.
    #[must_use]
    pub fn from_args() -> Self {
        let command = without_empty_variables(Self::command());
        command
            .clone()
            .try_get_matches()
            .and_then(|matches| Self::from_arg_matches(&matches))
            .unwrap_or_else(|error| explain(error, command).exit())
    }

    /// Does what was asked for.
    ///
    /// # Errors
    /// What went wrong, fit for one line.
    pub async fn run(self) -> Result<(), Failure> {
        match self.task {
            Task::Serve(config) => serve::run(*config).await,
            Task::Migrate(database) => migrate(&database).await,
            Task::Health(options) => health::run(options).await,
            Task::Account(AccountTask::Create { name, database }) => {
                create_account(&name, &database).await
            }
            Task::ApiKey(ApiKeyTask::Create { account, database }) => {
                create_api_key(account, &database).await
            }
            Task::ApiKey(ApiKeyTask::List { account, database }) => {
                list_api_keys(account, &database).await
            }
            Task::ApiKey(ApiKeyTask::Revoke {
                api_key_id,
                database,
            }) => revoke_api_key(api_key_id, &database).await,
            Task::ApiKey(ApiKeyTask::Check { database, api_key }) => {
                check_api_key(&database, &api_key).await
            }
            Task::Key(task) => print(&format!("{}\n", build_key(*task)?.as_str())),
            Task::Purge(database) => purge_now(&database).await,
            Task::Rules(changes) => print(&changes.rules()?.to_string()),
            Task::Charge(options) => charge::run(*options).await,
            Task::Openapi => print(&openapi::DOCUMENT),
            Task::Storm(options) => storm::run(*options).await,
        }
    }
}

/// clap takes an empty variable for a value. To us it is a variable that
/// somebody could not unset, as in a compose file.
fn without_empty_variables(command: Command) -> Command {
    let is_empty = |arg: &Arg| {
        arg.get_env()
            .and_then(std::env::var_os)
            .is_some_and(|value| value.is_empty())
    };
    command
        .mut_args(|arg| {
            if is_empty(&arg) {
                arg.env(Resettable::Reset)
            } else {
                arg
            }
        })
        .mut_subcommands(without_empty_variables)
}

/// Makes clap's error fit for people who set variables: it says which one holds
/// a wrong value, and its usage does not call all that are set required.
fn explain(mut error: clap::Error, mut command: Command) -> clap::Error {
    if !error.use_stderr() {
        return error;
    }
    command.build();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let mut task = &mut command;
    for argument in &arguments {
        if task.find_subcommand(argument).is_some() {
            task = task
                .find_subcommand_mut(argument)
                .expect("it was there a moment ago");
        }
    }
    if error.get(ContextKind::Usage).is_some() {
        let usage = ContextValue::StyledStr(task.render_usage());
        error.insert(ContextKind::Usage, usage);
    }
    let variable = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(name)) => task
            .get_arguments()
            .filter(|arg| arg.to_string() == *name)
            // Given as a flag, it is the flag that is wrong.
            .filter(|arg| {
                let flag = format!("--{}", arg.get_long().unwrap_or_default());
                !arguments
                    .iter()
                    .any(|given| given.split('=').next() == Some(&flag))
            })
            .find_map(|arg| arg.get_env()?.to_str())
            .map(str::to_owned),
        _ => None,
    };
    if let Some(variable) = variable {
        let tip =
            format!("the value is that of the variable {variable}, from the environment or .env");
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![tip.into()]),
        );
    }
    error
}

async fn connect(database: &Database) -> Result<PgConnection, Failure> {
    let options = database.connect_options()?;
    let conn = db::connect(&options)
        .await
        .map_err(|error| db::PreflightError::unreachable(db::server_name(&options), error))?;
    db::check_version(&conn)?;
    Ok(conn)
}

/// The tables have to be there; says so in a line if they are not.
async fn open(database: &Database) -> Result<PgConnection, Failure> {
    let mut conn = connect(database).await?;
    db::check_migrations(&mut conn).await?;
    Ok(conn)
}

async fn migrate(database: &Database) -> Result<(), Failure> {
    let mut conn = connect(database).await?;
    MIGRATOR.run(&mut conn).await?;
    conn.close().await?;
    tell(&format!(
        "the database is up to date ({} migrations)",
        MIGRATOR.iter().count()
    ));
    Ok(())
}

async fn create_account(name: &str, database: &Database) -> Result<(), Failure> {
    let mut conn = open(database).await?;
    // Both or none: an account whose key nobody has seen is of no use.
    let mut transaction = conn.begin().await?;
    let account_id = accounts::create(&mut transaction, name).await?;
    let (_, api_key) = accounts::create_api_key(&mut transaction, account_id)
        .await?
        .ok_or("the account went away while it was made")?;
    transaction.commit().await?;
    show_api_key(&format!("account {account_id}"), &api_key)
}

fn show_api_key(whose: &str, api_key: &ApiKey) -> Result<(), Failure> {
    tell("The API key is shown only now; keep it safe.");
    print_in_full(&format!("{whose}\napi_key {}\n", api_key.reveal())).map_err(|error| {
        format!("made {whose}, but its API key could not be shown and is lost: {error}").into()
    })
}

async fn create_api_key(account: AccountId, database: &Database) -> Result<(), Failure> {
    let mut conn = open(database).await?;
    let (api_key_id, api_key) = accounts::create_api_key(&mut conn, account)
        .await?
        .ok_or_else(|| format!("there is no account {account}"))?;
    show_api_key(&format!("api_key_id {api_key_id}"), &api_key)
}

async fn list_api_keys(account: AccountId, database: &Database) -> Result<(), Failure> {
    let mut conn = open(database).await?;
    let rows = accounts::list_api_keys(&mut conn, account)
        .await?
        .ok_or_else(|| format!("there is no account {account}"))?;
    let lines = rows.into_iter().map(|row| {
        let state = match row.revoked_at {
            Some(at) => format!("revoked {}", at.format("%FT%TZ")),
            None => "active".to_owned(),
        };
        format!(
            "{} created {} {state}\n",
            row.api_key_id,
            row.created_at.format("%FT%TZ")
        )
    });
    print(&lines.collect::<String>())
}

async fn revoke_api_key(api_key_id: ApiKeyId, database: &Database) -> Result<(), Failure> {
    let mut conn = open(database).await?;
    if !accounts::revoke_api_key(&mut conn, api_key_id).await? {
        return Err(format!("there is no API key {api_key_id}").into());
    }
    tell("revoked; it is dead on every replica within 5 seconds");
    Ok(())
}

async fn check_api_key(database: &Database, api_key: &ApiKeySource) -> Result<(), Failure> {
    let api_key: ApiKey = api_key.read()?.parse()?;
    let mut conn = open(database).await?;
    let account_id = accounts::authenticate(&mut conn, api_key.hash())
        .await?
        .ok_or("the API key is unknown or revoked")?;
    print(&format!("account {account_id}\n"))
}

fn build_key(task: KeyTask) -> Result<Key, key_builder::KeyError> {
    match task {
        KeyTask::Payment {
            order,
            amount,
            version,
        } => key_builder::payment(&order, amount, version),
        KeyTask::Form { user, form, window } => {
            Ok(window.pick(&key_builder::form(&user, &form, window.window()?)?))
        }
        KeyTask::Webhook { source, event } => key_builder::webhook(&source, &event),
        KeyTask::Message { id } => key_builder::message(&id),
        KeyTask::Email {
            recipient,
            template,
            day,
        } => key_builder::email(&recipient, &template, day),
        KeyTask::Compound {
            entity,
            action,
            data,
            window,
        } => {
            let data = key_builder::Data::from_json(&data)?;
            let keys = key_builder::compound(&entity, &action, window.window()?, &data)?;
            Ok(window.pick(&keys))
        }
        KeyTask::Mint => Ok(key_builder::mint()),
    }
}

impl Window {
    fn window(&self) -> Result<key_builder::Window, key_builder::KeyError> {
        #[expect(
            clippy::disallowed_methods,
            reason = "the key is the caller's, and so is the clock"
        )]
        let at = self.at.unwrap_or_else(Utc::now);
        key_builder::Window::of(self.length, at)
    }

    fn pick(&self, keys: &Windowed) -> Key {
        if self.previous {
            keys.previous().clone()
        } else {
            keys.current().clone()
        }
    }
}

async fn purge_now(database: &Database) -> Result<(), Failure> {
    let mut conn = open(database).await?;
    db::check_layout(&mut conn).await?;
    conn.close().await?;
    let pool = db::Server::direct(database.connect_options()?).pool(1);
    let count = purge::run_until_done(&pool).await?;
    tell(&format!("purged {count} expired answers"));
    Ok(())
}

/// To standard output. A reader who has seen enough (`| head`) is the end of it,
/// and no error.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match write_out(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// To standard output, of what is lost if nobody reads it: an API key that is
/// shown once, a charge that was made.
pub(crate) fn print_in_full(text: &str) -> Result<(), Failure> {
    Ok(write_out(text)?)
}

fn write_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A line to standard error, for people. Where nobody reads it that is no error,
/// and no panic, which `eprintln!` would make of it.
pub fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
