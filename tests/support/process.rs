//! payonce as a process, reached over TCP, as its users run it.

use std::process::Stdio;

use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::Reply;

pub const BINARY: &str = env!("CARGO_BIN_EXE_payonce");

/// `payonce serve` on a free port.
pub struct Process {
    child: Child,
    pub address: String,
}

impl Process {
    /// Comes back when it listens.
    pub async fn serve(database_url: &str) -> Self {
        Self::serve_with(database_url, &[]).await
    }

    /// The same with settings of its own, by their variables.
    pub async fn serve_with(database_url: &str, settings: &[(&str, &str)]) -> Self {
        Self::try_serve(database_url, settings)
            .await
            .expect("it ended before it listened")
    }

    /// The same; `None` if it ends before it listens.
    pub async fn try_serve(database_url: &str, settings: &[(&str, &str)]) -> Option<Self> {
        let mut child = Command::new(BINARY)
            .arg("serve")
            .env("DATABASE_URL", database_url)
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("LOG_FORMAT", "json")
            // The longest: on a slow machine what is in flight takes its time.
            .env("DUPLICATE_WAIT", "10s")
            .env_remove("RUST_LOG")
            .envs(settings.iter().copied())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next_line().await.unwrap()?;
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["message"] == "listening" {
                break event["address"].as_str().unwrap().to_owned();
            }
        };
        // Its log has to go somewhere, or it would wait for us.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Some(Self { child, address })
    }

    /// Sends a signal. Not by the program `kill`, which small systems lack.
    pub fn signal(&self, signal: Signal) {
        send_signal(self.child.id(), signal).unwrap();
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGTERM, and how it ended.
    pub async fn terminate(self) -> std::process::ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// How it ended.
    pub async fn ended(mut self) -> std::process::ExitStatus {
        self.child.wait().await.unwrap()
    }
}

/// Sends a signal to a child; fails if it has ended and was waited for.
pub fn send_signal(child: Option<u32>, signal: Signal) -> std::io::Result<()> {
    let pid = child
        .and_then(|pid| Pid::from_raw(pid.cast_signed()))
        .ok_or(std::io::ErrorKind::NotFound)?;
    Ok(kill_process(pid, signal)?)
}

/// An HTTP client; `Err` is a connection that broke before the answer.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<HttpConnector, Body>,
    api_key: String,
}

impl HttpClient {
    pub fn new(api_key: &str) -> Self {
        Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            api_key: api_key.to_owned(),
        }
    }

    pub async fn charge(
        &self,
        address: &str,
        key: &str,
    ) -> Result<Reply, Box<dyn std::error::Error + Send + Sync>> {
        let request = Request::post(format!("http://{address}/v1/charges"))
            .header("authorization", format!("Bearer {}", self.api_key))
            .header("idempotency-key", key)
            .header("content-type", "application/json")
            .body(Body::from(
                r#"{"amount":5000,"currency":"usd","customer":"cus_ABC123"}"#,
            ))?;
        let (parts, body) = self.client.request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Reply {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(body.to_vec())?,
        })
    }
}
