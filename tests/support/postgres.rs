//! A PostgreSQL that a test owns: it may be stopped, crashed and restarted,
//! which the one behind `DATABASE_URL` never is.

use std::process::{Command, Stdio};

use payonce::MIGRATOR;
use sqlx::{PgPool, postgres::PgPoolOptions};

/// A private cluster, removed at the end.
pub struct Cluster {
    name: String,
    pub url: String,
}

impl Cluster {
    /// A new one, with our tables.
    pub async fn start(name: &str) -> Self {
        Self::start_with(name, &[]).await
    }

    /// The same with settings of its own: `-c name=value`.
    pub async fn start_with(name: &str, settings: &[&str]) -> Self {
        // A test that was killed may have left one of the same name behind.
        script(&["remove", name]);
        let url = script(&[&["start", name], settings].concat());
        let cluster = Self {
            name: name.to_owned(),
            url,
        };
        MIGRATOR.run(&cluster.pool().await).await.unwrap();
        cluster
    }

    /// A pool of the test's own, for looking.
    pub async fn pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(4)
            .connect(&self.url)
            .await
            .unwrap()
    }

    /// `fast` or `immediate`, which is a crash. Comes back when it runs again.
    pub async fn restart(&self, mode: &'static str) {
        let name = self.name.clone();
        let url = tokio::task::spawn_blocking(move || script(&["restart", &name, mode]))
            .await
            .unwrap();
        assert_eq!(url, self.url, "a restarted server is where it was");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        script(&["remove", &self.name]);
    }
}

fn script(arguments: &[&str]) -> String {
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/postgres"))
        .arg("cluster")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "scripts/postgres cluster {arguments:?} failed"
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
