//! The binary: reads the command line, starts logging, runs the command.

use std::{io::IsTerminal, process::ExitCode};

use payonce::{
    cli::{self, Cli},
    config::{self, LogFormat},
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // Before any thread is started, since it changes the environment. What is
    // set already wins.
    if let Err(error) = config::load_env_file() {
        cli::tell(&format!("payonce: {error}"));
        return ExitCode::from(cli::USAGE);
    }
    let cli = Cli::from_args();
    start_logging(cli.log_format);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            cli::tell(&format!("payonce: cannot start: {error}"));
            return ExitCode::from(cli::USAGE);
        }
    };
    match runtime.block_on(cli.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::tell(&format!("payonce: {error}"));
            ExitCode::from(cli::exit_code(&error))
        }
    }
}

fn start_logging(format: LogFormat) {
    let filter = std::env::var("RUST_LOG")
        .ok()
        .filter(|directives| !directives.is_empty())
        // A second `migrate` makes PostgreSQL notice that the tables are there.
        .unwrap_or_else(|| "info,sqlx::postgres::notice=warn".to_owned());
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
