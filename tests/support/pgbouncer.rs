//! A PgBouncer in transaction mode, before the server that a test uses.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use sqlx::{
    ConnectOptions, PgPool,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::net::TcpStream;

use super::{
    eventually,
    process::{Signal, send_signal},
};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/pgbouncer");

pub struct PgBouncer {
    child: Child,
    directory: PathBuf,
    port: u16,
}

impl PgBouncer {
    /// Before the server of `pool`, with three sessions for everybody, so that
    /// two transactions of one client rarely meet the same. `None`, and a line
    /// that says so, where it is not to be had.
    pub async fn before(pool: &PgPool) -> Option<Self> {
        Self::with(pool, "").await
    }

    pub async fn with(pool: &PgPool, more: &str) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);

        let found = Command::new(SCRIPT).stdin(Stdio::null()).status().unwrap();
        if !found.success() {
            assert!(
                std::env::var_os("CI").is_none(),
                "PgBouncer has to be there in CI"
            );
            eprintln!("not tested: PgBouncer is not here");
            return None;
        }
        // A listener that is closed again: the port is free for now.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("payonce-pgbouncer-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let config = directory.join("pgbouncer.ini");
        std::fs::write(&config, configuration(&pool.connect_options(), port, more)).unwrap();
        let child = Command::new(SCRIPT)
            .arg(&config)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pgbouncer = Self {
            child,
            directory,
            port,
        };
        eventually("PgBouncer listens", || async {
            TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Some(pgbouncer)
    }

    /// The way to the same database through it.
    pub fn options(&self, direct: &PgConnectOptions) -> PgConnectOptions {
        direct
            .clone()
            .host("127.0.0.1")
            .port(self.port)
            .ssl_mode(PgSslMode::Disable)
    }

    pub fn url(&self, pool: &PgPool) -> String {
        self.options(&pool.connect_options())
            .to_url_lossy()
            .to_string()
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        // SIGTERM, which runuser passes on; SIGKILL would hit runuser alone.
        // Whoever could not send it must not wait for the end either.
        if send_signal(Some(self.child.id()), Signal::TERM).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn configuration(server: &PgConnectOptions, port: u16, more: &str) -> String {
    let url = server.to_url_lossy();
    let password = url.password().unwrap_or_default();
    format!(
        "[databases]\n\
         * = host={} port={} user={} password={password}\n\
         [pgbouncer]\n\
         listen_addr = 127.0.0.1\n\
         listen_port = {port}\n\
         unix_socket_dir =\n\
         auth_type = any\n\
         pool_mode = transaction\n\
         default_pool_size = 3\n\
         # The default of 15 s is longer than a request waits.\n\
         server_login_retry = 1\n\
         {more}\n",
        server.get_host(),
        server.get_port(),
        server.get_username(),
    )
}
