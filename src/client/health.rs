//! `payonce health`: what a container's health check runs, since an image need
//! not have curl.

use std::time::Duration;

use clap::Args;

use super::cause;
use crate::cli::{self, Failure};

/// Which service.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where it listens; it is asked over the loopback interface if that is
    /// everywhere
    #[arg(
        long,
        env = "LISTEN_ADDR",
        default_value = "127.0.0.1:8080",
        value_name = "HOST:PORT"
    )]
    listen_addr: String,
}

/// Longer than the service itself takes to find out.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Asks `/readyz`.
///
/// # Errors
/// If it does not answer, or is not ready.
pub async fn run(options: Options) -> Result<(), Failure> {
    let url = format!("http://{}/readyz", reachable(&options.listen_addr));
    // Fails only if a provider is there already, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder()
        // A proxy for the Internet has no way to this machine.
        .no_proxy()
        .timeout(TIMEOUT)
        .build()?;
    let answer = match http.get(&url).send().await {
        Ok(answer) => answer.status(),
        Err(error) => return Err(format!("{url} does not answer: {}", cause(&error)).into()),
    };
    if !answer.is_success() {
        return Err(format!("not ready: {url} answers {}", answer.as_u16()).into());
    }
    cli::print("ready\n")
}

/// What can be connected to, of what can be listened on.
fn reachable(listen_addr: &str) -> String {
    match listen_addr.rsplit_once(':') {
        Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        _ => listen_addr.to_owned(),
    }
}
