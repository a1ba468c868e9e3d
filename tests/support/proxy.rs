//! A TCP proxy between the service and PostgreSQL that can be told to fail.

use std::{
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::{PgPool, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// What COMMIT looks like on the wire: a simple query of this text.
const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";

/// How the network is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Network {
    Well,
    /// What is connected is cut, and nobody is taken.
    Down,
    /// Nothing arrives, and nobody is told so.
    Silent,
    /// What is connected never moves again and is not told so; what connects
    /// later is well.
    Frozen,
    /// Everything takes this long, each way.
    Slow(Duration),
}

pub struct Proxy {
    port: u16,
    target: Arc<Mutex<(String, u16)>>,
    network: watch::Sender<Network>,
    commits_to_lose: Arc<AtomicUsize>,
    committed_first: Arc<AtomicBool>,
    transaction_bytes_max: Arc<AtomicUsize>,
    answer_bytes_max: Arc<AtomicUsize>,
}

impl Proxy {
    /// To the server that the pool is connected to.
    pub async fn to(pool: &PgPool) -> Self {
        let target = Arc::new(Mutex::new(address(pool)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            target: Arc::clone(&target),
            network: watch::Sender::new(Network::Well),
            commits_to_lose: Arc::default(),
            committed_first: Arc::default(),
            transaction_bytes_max: Arc::new(AtomicUsize::new(usize::MAX)),
            answer_bytes_max: Arc::new(AtomicUsize::new(usize::MAX)),
        };
        let (network, to_lose, committed_first, bytes_max) = (
            proxy.network.clone(),
            Arc::clone(&proxy.commits_to_lose),
            Arc::clone(&proxy.committed_first),
            [
                Arc::clone(&proxy.transaction_bytes_max),
                Arc::clone(&proxy.answer_bytes_max),
            ],
        );
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if *network.borrow() == Network::Down {
                    continue;
                }
                let target = target.lock().unwrap().clone();
                let Ok(server) = TcpStream::connect(target).await else {
                    continue;
                };
                let (network, mut down) = (network.subscribe(), network.subscribe());
                let (to_lose, committed_first, bytes_max) = (
                    Arc::clone(&to_lose),
                    Arc::clone(&committed_first),
                    bytes_max.clone(),
                );
                tokio::spawn(async move {
                    tokio::select! {
                        () = forward(client, server, network, &to_lose, &committed_first, &bytes_max) => {}
                        _ = down.wait_for(|network| *network == Network::Down) => {}
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

    /// Connections that are made from now on end at another server, as after a failover.
    pub fn lead_to(&self, pool: &PgPool) {
        *self.target.lock().unwrap() = address(pool);
    }

    /// The network is like this from now on.
    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }

    /// Cuts the connection after the next `count` COMMITs were forwarded:
    /// `committed` after the server has done it, or else at once, so that it may
    /// still be at it when the service comes back.
    pub fn lose_commits(&self, count: usize, committed: bool) {
        self.committed_first.store(committed, Ordering::SeqCst);
        self.commits_to_lose.store(count, Ordering::SeqCst);
    }

    /// From now on a connection falls silent when it is sent more than this in one
    /// transaction: a network on which that takes forever.
    pub fn choke_on(&self, transaction_bytes: usize) {
        self.transaction_bytes_max
            .store(transaction_bytes, Ordering::SeqCst);
    }

    /// The same when it answers with more than this at once.
    pub fn choke_on_answers(&self, bytes: usize) {
        self.answer_bytes_max.store(bytes, Ordering::SeqCst);
    }

    /// How many COMMITs are still to be lost.
    pub fn commits_to_lose(&self) -> usize {
        self.commits_to_lose.load(Ordering::SeqCst)
    }
}

fn address(pool: &PgPool) -> (String, u16) {
    let options = pool.connect_options();
    (options.get_host().to_owned(), options.get_port())
}

async fn forward(
    mut client: TcpStream,
    mut server: TcpStream,
    mut network: watch::Receiver<Network>,
    to_lose: &AtomicUsize,
    committed_first: &AtomicBool,
    [transaction_bytes_max, answer_bytes_max]: &[Arc<AtomicUsize>; 2],
) {
    let (mut transaction_bytes, mut answer_bytes) = (0, 0);
    let (mut from_client, mut from_server) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut freeze = network.clone();
    loop {
        tokio::select! {
            biased;
            () = async { let _ = freeze.wait_for(|network| *network == Network::Frozen).await; } => {
                return pending().await;
            }
            read = client.read(&mut from_client) => {
                let Ok(length @ 1..) = read else { return };
                let bytes = &from_client[..length];
                pass(&mut network).await;
                answer_bytes = 0;
                transaction_bytes += length;
                if transaction_bytes > transaction_bytes_max.load(Ordering::SeqCst) {
                    return pending().await;
                }
                if bytes.ends_with(COMMIT) {
                    transaction_bytes = 0;
                }
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
                pass(&mut network).await;
                answer_bytes += length;
                if answer_bytes > answer_bytes_max.load(Ordering::SeqCst) {
                    return pending().await;
                }
                if client.write_all(&from_server[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Comes back when the network has let something through.
async fn pass(network: &mut watch::Receiver<Network>) {
    let now = *network.borrow();
    match now {
        Network::Well | Network::Down | Network::Frozen => {}
        Network::Slow(delay) => tokio::time::sleep(delay).await,
        Network::Silent => {
            let _ = network
                .wait_for(|network| *network != Network::Silent)
                .await;
        }
    }
}
