//! What the handbook tells people to type does what it says.

use std::process::Stdio;

use sqlx::{Column, Connection, Executor, PgConnection, PgPool, Row};
use tokio::process::Command;

use crate::support::{
    make_account,
    process::{BINARY, Process},
    url,
};

const HANDBOOK: &str = include_str!("../docs/handbook.md");

/// A block of the handbook, and what it has to print.
#[derive(Debug)]
struct Block {
    language: &'static str,
    text: String,
    printed: Option<String>,
}

fn blocks() -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for fenced in HANDBOOK.split("\n```").skip(1).step_by(2) {
        let (language, text) = fenced.split_once('\n').unwrap();
        if language == "text" {
            let last = blocks.last_mut().expect("a block stands before its output");
            assert!(last.printed.is_none());
            last.printed = Some(text.to_owned());
        } else {
            blocks.push(Block {
                language,
                text: text.to_owned(),
                printed: None,
            });
        }
    }
    blocks
}

/// `…` stands for anything within a line.
fn is_like(line: &str, expected: &str) -> bool {
    let mut rest = line;
    let parts: Vec<_> = expected.split('…').collect();
    for (i, part) in parts.iter().enumerate() {
        let found = if i == 0 {
            rest.starts_with(part).then_some(0)
        } else if i == parts.len() - 1 && part.is_empty() {
            Some(rest.len())
        } else {
            rest.find(part)
        };
        let Some(at) = found else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

#[track_caller]
fn assert_printed(block: &Block, printed: &str) {
    let expected = block.printed.as_deref().unwrap_or_default();
    let (lines, wanted): (Vec<_>, Vec<_>) = (
        printed.lines().map(str::trim_end).collect(),
        expected.lines().map(str::trim_end).collect(),
    );
    let like = lines.len() == wanted.len()
        && lines
            .iter()
            .zip(&wanted)
            .all(|(line, expected)| is_like(line, expected));
    assert!(
        like,
        "{}\nprinted\n{printed}\ninstead of\n{expected}",
        block.text
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn every_command_does_what_it_says(pool: PgPool) {
    if Command::new("curl")
        .arg("--version")
        .output()
        .await
        .is_err()
    {
        eprintln!("curl is not here");
        return;
    }
    let settings = [("KEYLESS", "fingerprint"), ("DUPLICATE_GUARD", "warn")];
    let one = Process::serve_with(&url(&pool), &settings).await;
    let other = Process::serve_with(&url(&pool), &settings).await;
    let (_, api_key) = make_account(&pool).await;
    let mut conn = PgConnection::connect(&url(&pool)).await.unwrap();
    let binary = std::path::Path::new(BINARY);
    let path = format!(
        "{}:{}",
        binary.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let scratch = tempfile::tempdir().unwrap();

    let (mut commands, mut queries) = (0, 0);
    for block in blocks() {
        match block.language {
            "sh" => {
                // Beside what other runs of this test leave in /tmp.
                let text = block.text.replace("/tmp", scratch.path().to_str().unwrap());
                let output = Command::new("bash")
                    .args(["-c", &text])
                    .env("PATH", &path)
                    .env("PAYONCE_URL", format!("http://{}", one.address))
                    .env("OTHER_URL", format!("http://{}", other.address))
                    .env("PAYONCE_API_KEY", &api_key)
                    .env_remove("RULES")
                    .stdin(Stdio::null())
                    .output()
                    .await
                    .unwrap();
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(said.is_empty(), "{}\nsaid\n{said}", block.text);
                assert_printed(&block, &String::from_utf8_lossy(&output.stdout));
                commands += 1;
            }
            "sql" => {
                let rows = conn
                    .fetch_all(sqlx::raw_sql(sqlx::AssertSqlSafe(block.text.clone())))
                    .await
                    .unwrap();
                let lines: Vec<_> = rows
                    .iter()
                    .map(|row| {
                        let cells = row
                            .columns()
                            .iter()
                            .map(|c| row.get::<String, _>(c.ordinal()));
                        cells.collect::<Vec<_>>().join(" | ")
                    })
                    .collect();
                let printed = if lines.is_empty() && block.printed.is_some() {
                    "(no rows)".to_owned()
                } else {
                    lines.join("\n")
                };
                assert_printed(&block, &printed);
                queries += 1;
            }
            // The set-up, which this test has of its own; what doc tests compile;
            // and what is there for comparison.
            "console" | "rust" | "mysql" => {}
            other => panic!("nothing runs a block of {other}"),
        }
    }
    assert!(
        commands >= 11 && queries == 3,
        "{commands} commands, {queries} queries"
    );
}
