//! The storm: attacks a running service the way real networks do, and audits it.
//!
//! It plays customers who each want to pay once, through clients that ask again
//! under the same key when an answer is lost. A part of them authorises and
//! captures, or wants money back, all or in parts, also two clients at once.
//! Between the clients and the service stands a proxy that delays, drops, cuts,
//! duplicates and lies. Then it asks every key once more, reads all charges and
//! the refunds through the API, and counts what must not be: double charges,
//! lost charges, captures and refunds that are doubled, lost or too large, sums
//! that do not add up, answers that differ from the first, keys without an
//! answer. All counts have to be 0. Ctrl-C cuts it short: those who came until
//! then are audited, unless it is pressed again.
//!
//! The seed decides what each customer wants and does, and what happens to each
//! of its requests; it does not decide the order in which they run.
//!
//! | module | what it is |
//! | --- | --- |
//! | `script` | what a seed makes of a customer and of a request |
//! | `proxy` | the faults between client and service |
//! | `ledger` | every request that reached the service, and what came back |
//! | `customers` | the clients, and how they retry |
//! | `audit` | the questions afterwards, to the API and to the tables |
//! | `history` | what a linearizability checker is given |
//! | `report` | the verdict, for people and for programs |

mod audit;
mod customers;
mod history;
mod ledger;
mod proxy;
mod report;
mod script;

use std::{sync::Arc, time::Duration};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rand::RngExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    cli::{Failure, tell},
    config,
};
use audit::Findings;
use customers::Shop;
use ledger::Ledger;
use proxy::FaultProxy;
use script::Weather;

/// For `--help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  nothing wrong was found
  1  something wrong was found
  2  no verdict: the storm could not run, or was cut short (Ctrl-C) before it
     found anything";

/// Why there is no verdict: neither that something is wrong nor that nothing is.
#[derive(Debug, thiserror::Error)]
#[error("no verdict: {0}")]
pub struct NoVerdict(Failure);

/// How the storm blows.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where the service is; several are replicas of one deployment
    #[arg(long = "target", env = "PAYONCE_URL", default_value = "http://127.0.0.1:8080", value_name = "URL", value_parser = target)]
    targets: Vec<String>,

    /// Whose charges they are
    #[command(flatten)]
    api_key: config::ApiKeySource,

    /// How many customers want to pay once
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    customers: u32,

    /// How many of them at a time
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,

    /// Decides customers and faults; a new one is drawn and printed if it is not given
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// The share of the customers who do more than pay: they authorise and capture,
    /// all or a part; or want refunds, of all, in parts, two at once, or of more
    /// than is left. 0 for a service that only charges
    #[arg(long, default_value_t = 0.30, value_parser = script::probability, value_name = "P")]
    changes: f64,

    /// The service's answers expire while the storm blows (RULES=payment=1s): what
    /// is decided or written anew then is not taken for a differing answer
    #[arg(long)]
    answers_expire: bool,

    /// How likely what is
    #[command(flatten)]
    weather: Weather,

    /// How long a customer goes on asking
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    patience: Duration,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,

    /// Audit the tables too. Not taken from the environment
    #[arg(long, value_name = "URL", hide_env_values = true)]
    database_url: Option<String>,

    /// Write every request that reached the service, and what came back, a line
    /// of JSON each, for a linearizability checker
    #[arg(long, value_name = "FILE")]
    history: Option<std::path::PathBuf>,
}

fn target(text: &str) -> Result<String, String> {
    let url = reqwest::Url::parse(text).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err("it has to be like http://127.0.0.1:8080".to_owned());
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// Blows, audits, and prints the report and the verdict.
///
/// # Errors
/// What was found, if one of the counts is not 0; [`NoVerdict`] if it could not
/// run to its end.
pub async fn run(options: Options) -> Result<(), Failure> {
    let report = match blow(&options).await {
        Ok(report) => report,
        Err(error) if error.is::<config::SettingError>() => return Err(error),
        Err(error) => return Err(NoVerdict(error).into()),
    };
    report.print(options.json).map_err(NoVerdict)?;
    report.verdict()
}

async fn blow(options: &Options) -> Result<report::Report, Failure> {
    let api_key = options.api_key.read()?;
    // Fails only if a provider is there already, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let seed = options.seed.unwrap_or_else(|| rand::rng().random());
    // A deployment remembers keys: each run has its own.
    let mark = format!("{:08x}", rand::rng().random::<u32>());
    tell(&format!(
        "storm: seed {seed}, mark {mark}, {} customers",
        options.customers
    ));

    let ledger = Arc::new(Ledger::new());
    let service = Arc::new(proxy::Service::new(
        options.targets.clone(),
        &api_key,
        Arc::clone(&ledger),
    )?);
    service.is_there().await?;
    let proxy = FaultProxy::start(Arc::clone(&service)).await?;
    let shop = Arc::new(Shop::new(
        options,
        seed,
        &mark,
        proxy.address,
        Arc::clone(&ledger),
    )?);

    let mut interrupts = Interrupts::new()?;
    let progress = bar(u64::from(options.customers), "customers");
    let results = shop.open(&progress, interrupts.next()).await;
    progress.finish_and_clear();
    if results.cut_short {
        tell(&format!(
            "storm: cut short; auditing the {} customers who came (Ctrl-C again: no audit)",
            results.customers
        ));
    }

    let progress = bar(u64::from(results.customers), "keys audited");
    let findings = tokio::select! {
        findings = audit::run(&shop, &service, options, results.customers, &progress) => findings?,
        () = interrupts.next() => Findings::without_audit(&shop),
    };
    progress.finish_and_clear();

    if let Some(file) = &options.history {
        history::write(file, &shop, &findings.reads)
            .map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    }
    Ok(report::Report::new(
        seed, &mark, &shop, &ledger, results, findings,
    ))
}

/// Ctrl-C, and the SIGTERM of whoever limits the time.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Only where somebody looks at a terminal; indicatif finds out by itself.
fn bar(length: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}, {eta} left");
    let bar = ProgressBar::new(length).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
