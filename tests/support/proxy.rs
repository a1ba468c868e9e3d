//! A TCP proxy between the service and PostgreSQL that can be told to fail.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use sqlx::{PgPool, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// What COMMIT looks like on the wire: a simple query of this text.
const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";

pub struct Proxy {
    port: u16,
    refuse: watch::Sender<bool>,
    commits_to_lose: Arc<AtomicUsize>,
    committed_first: Arc<AtomicBool>,
}

impl Proxy {
    /// To the server that the pool is connected to.
    pub async fn to(pool: &PgPool) -> Self {
        let options = pool.connect_options();
        let target = (options.get_host().to_owned(), options.get_port());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            refuse: watch::Sender::new(false),
            commits_to_lose: Arc::default(),
            committed_first: Arc::default(),
        };
        let (refuse, to_lose, committed_first) = (
            proxy.refuse.clone(),
            Arc::clone(&proxy.commits_to_lose),
            Arc::clone(&proxy.committed_first),
        );
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if *refuse.borrow() {
                    continue;
                }
                let server = TcpStream::connect(&target).await.unwrap();
                let (mut refused, to_lose, committed_first) = (
                    refuse.subscribe(),
                    Arc::clone(&to_lose),
                    Arc::clone(&committed_first),
                );
                tokio::spawn(async move {
                    tokio::select! {
                        () = forward(client, server, &to_lose, &committed_first) => {}
                        _ = refused.wait_for(|refuse| *refuse) => {}
                    }
                });
            }
        });
        proxy
    }

    /// The way to the same database through here.
    pub fn options(&self, direct: &PgConnectOptions) -> PgConnectOptions {
        direct.clone().host("127.0.0.1").port(self.port)
    }

    /// Cuts what is connected, and takes nobody, until told otherwise.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.send_replace(refuse);
    }

    /// Cuts the connection after the next `count` COMMITs were forwarded:
    /// `committed` after the server has done it, or else at once, so that it may
    /// still be at it when the service comes back.
    pub fn lose_commits(&self, count: usize, committed: bool) {
        self.committed_first.store(committed, Ordering::SeqCst);
        self.commits_to_lose.store(count, Ordering::SeqCst);
    }

    /// How many COMMITs are still to be lost.
    pub fn commits_to_lose(&self) -> usize {
        self.commits_to_lose.load(Ordering::SeqCst)
    }
}

async fn forward(
    mut client: TcpStream,
    mut server: TcpStream,
    to_lose: &AtomicUsize,
    committed_first: &AtomicBool,
) {
    let (mut from_client, mut from_server) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Ok(length @ 1..) = read else { return };
                let bytes = &from_client[..length];
                if server.write_all(bytes).await.is_err() {
                    return;
                }
                let loses = bytes.ends_with(COMMIT)
                    && to_lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
                if loses {
                    if committed_first.load(Ordering::SeqCst) {
                        let _ = server.read(&mut from_server).await;
                    }
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&from_server[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}
