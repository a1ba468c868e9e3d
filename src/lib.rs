//! payonce: a payments service whose charges happen once, however often they
//! are asked for.
//!
//! The map, from the outside in; each module uses those below it and none above:
//!
//! | module | what it is |
//! | --- | --- |
//! | [`cli`], [`config`] | the commands and their settings |
//! | [`serve`] | starts the parts, and ends them in order |
//! | [`client`] | asks until it knows, and says what is certain; used from outside, by programs and by `payonce charge` |
//! | [`storm`] | attacks a running service, and audits it |
//! | [`layer`] | the same promises for the handlers of any axum service |
//! | [`http`] | bytes to commands, answers to bytes |
//! | [`writer`] | takes commands, writes them many to a transaction, answers after COMMIT |
//! | [`reader`] | reads charges, many to a statement |
//! | [`key_builder`] | builds idempotency keys, for those who ask |
//! | [`charges`], [`changes`], [`refunds`], [`accounts`], [`idempotency`] | the words of the domain, and the SQL of their tables |
//! | [`processor`] | what moves the money |
//! | [`db`] | how to reach PostgreSQL, and what its errors mean |
//! | [`error`], [`ids`], [`money`], [`pagination`] | values that all of them share |
//!
//! `ARCHITECTURE.md` follows one charge through them.

pub mod accounts;
pub mod changes;
pub mod charges;
pub mod cli;
pub mod client;
pub mod config;
pub mod db;
pub mod error;
pub mod http;
pub mod idempotency;
pub mod ids;
pub mod key_builder;
pub mod layer;
pub mod money;
pub mod pagination;
pub mod processor;
pub mod reader;
pub mod refunds;
pub mod serve;
pub mod storm;
pub mod writer;

/// The schema, step by step; `sqlx migrate run` and `payonce migrate` apply it.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!();

/// The handbook's Rust, compiled as doc tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/handbook.md")]
pub struct Handbook;
