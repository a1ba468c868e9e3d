//! `payonce charge`: one charge from the command line.

use std::{collections::BTreeMap, io::Write, time::Duration};

use clap::Args;

use super::{Client, Failure, Operation, Settings, Status, check_base_url};
use crate::{
    charges::ChargeRequest,
    cli, config,
    idempotency::Key,
    money::{AMOUNT_MAX, Amount, Currency},
};

/// For `--help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  charged; the charge stands on standard output
  1  certainly not charged: refused, declined, or never sent
  2  the command line or a setting is wrong; nothing was sent
  3  unknown, or pending: ask again with the same --key and the same operation
Whatever else ends it (a signal, say) is as good as 3. With --key, 1 is a
decline, or a key that belongs to another charge: an earlier command with this
key may have charged, so a service that is away or refuses is 3. So is a key that
belongs to a capture, refund or update: then look the key up, as the message says,
and do not ask again.";

/// What to charge, where, and how long to try.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// How much, in the currency's minor unit: 5000 is 50.00 USD
    #[arg(long, value_name = "N", value_parser = amount)]
    amount: Amount,

    /// ISO 4217, in lower case
    #[arg(long, value_name = "CODE", value_parser = currency)]
    currency: Currency,

    /// Your name for who pays
    #[arg(long, value_name = "TEXT")]
    customer: Option<String>,

    /// The token of the card, such as `tok_visa`
    #[arg(long, value_name = "TOKEN")]
    source: Option<String>,

    /// For people
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,

    /// For programs; may be given more than once
    #[arg(long, value_name = "NAME=VALUE", value_parser = entry)]
    metadata: Vec<(String, String)>,

    /// The idempotency key; a new one is made and printed if it is not given
    #[arg(long, value_name = "KEY", value_parser = key)]
    key: Option<Key>,

    /// Where the service is
    #[arg(long, env = "PAYONCE_URL", default_value = "http://127.0.0.1:8080", value_name = "URL", value_parser = target)]
    target: String,

    /// Whose charge it is
    #[command(flatten)]
    api_key: config::ApiKeySource,

    /// How long to go on asking
    #[arg(long, default_value = "30s", value_parser = config::positive, value_name = "DURATION")]
    deadline: Duration,
}

/// An end that leaves open whether there is, or will be, a charge.
#[derive(Debug, thiserror::Error)]
pub enum Open {
    /// The deadline has come without an outcome.
    #[error(transparent)]
    Unknown(Failure),
    /// The charge is there, and not decided.
    #[error("the charge is pending; ask again with the same key: {0}")]
    Pending(String),
    /// It is charged, and whoever asked could not be told.
    #[error("charged, but standard output takes nothing ({0}); ask again with the same key: {1}")]
    Untold(cli::Failure, String),
}

fn amount(text: &str) -> Result<Amount, String> {
    text.parse()
        .ok()
        .and_then(Amount::new)
        .ok_or_else(|| format!("it has to be an integer from 1 to {AMOUNT_MAX}"))
}

fn currency(text: &str) -> Result<Currency, &'static str> {
    Currency::from_code(text).ok_or("it has to be an ISO 4217 code in lower case, such as usd")
}

fn entry(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("it has to be NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn key(text: &str) -> Result<Key, String> {
    Key::from_header(text.as_bytes()).map_err(|why| why.to_string())
}

fn target(text: &str) -> Result<String, super::ClientError> {
    check_base_url(text).map(str::to_owned)
}

/// Charges, and prints the charge.
///
/// # Errors
/// [`Open`] where it is not certain that nobody was charged; any other means
/// that it is.
pub async fn run(options: Options) -> Result<(), cli::Failure> {
    let mut metadata = BTreeMap::new();
    for (name, value) in options.metadata {
        if metadata.insert(name, value).is_some() {
            return Err("certainly not charged: a name stands in --metadata twice".into());
        }
    }
    let api_key = options.api_key.read()?;
    let client = Client::new(&options.target, &api_key)?.with_settings(Settings {
        deadline: options.deadline,
        ..Settings::default()
    });
    let operation = Operation::charge(&ChargeRequest {
        customer: options.customer,
        source: options.source,
        description: options.description,
        metadata,
        ..ChargeRequest::new(options.amount, options.currency)
    });
    let operation = if let Some(key) = options.key {
        operation.with_key(key)
    } else {
        // Before it is sent: who breaks it off has to know.
        writeln!(std::io::stderr(), "key {}", operation.key().to_header())
            .map_err(|error| format!("certainly not charged: cannot print the key: {error}"))?;
        operation
    };
    let key = || operation.key().to_header();
    match client.send(&operation).await {
        Ok(charged) => {
            cli::print_in_full(&format!("{}\n", charged.body))
                .map_err(|error| Open::Untold(error, key()))?;
            match charged.charge.status {
                Status::Succeeded => Ok(()),
                Status::Pending => Err(Open::Pending(key()).into()),
            }
        }
        Err(failure) if failure.certainly_not_charged() => Err(failure.into()),
        Err(failure) => Err(Open::Unknown(failure).into()),
    }
}
