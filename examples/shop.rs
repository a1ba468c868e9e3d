//! A small shop whose orders happen once, with `payonce::layer`.
//!
//! ```sh
//! DATABASE_URL=postgres://… cargo run --example shop
//! curl http://127.0.0.1:8090/orders -H 'X-User: ann' -H 'Idempotency-Key: cart_7' \
//!      -H 'Content-Type: application/json' -d '{"item": "teapot", "quantity": 2}'
//! ```
//!
//! Send it twice: the second answer is the first one, and the stock goes down
//! once.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use payonce::{
    http::error_pages,
    idempotency::{Scenario, purge},
    layer::{self, Idempotent, Tx},
};
use serde::Deserialize;
use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool};

/// The shop's own tables; that of the keys comes from the layer.
const SCHEMA: &str = "
    create table stock (item text primary key, pieces bigint not null check (pieces >= 0));
    create table orders (
        order_id bigint generated always as identity primary key,
        customer text not null,
        item text not null references stock,
        quantity bigint not null check (quantity > 0)
    );
    insert into stock values ('teapot', 100), ('cup', 1000);
";

#[derive(Deserialize)]
struct Order {
    item: String,
    quantity: i64,
}

/// Whose request it is. A real shop finds that out from a session.
fn customer(request: &Parts) -> Option<String> {
    let user = request.headers.get("x-user")?.to_str().ok()?;
    (!user.is_empty()).then(|| user.to_owned())
}

/// Takes from the stock and notes the order: both, and the answer, or nothing.
async fn order(mut tx: Tx, parts: Parts, Json(order): Json<Order>) -> Response {
    let taken = sqlx::query(
        "update stock set pieces = pieces - $2 where item = $1 and pieces >= $2 and $2 > 0",
    )
    .bind(&order.item)
    .bind(order.quantity)
    .execute(&mut *tx)
    .await;
    match taken {
        Ok(done) if done.rows_affected() == 1 => {}
        // An outcome like any other: it is stored, and replayed.
        Ok(_) => return (StatusCode::CONFLICT, "so many are not there").into_response(),
        // A fault: nothing is stored, and the same key works later.
        Err(_) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
    let order_id: Result<i64, _> = sqlx::query_scalar(
        "insert into orders (customer, item, quantity) values ($1, $2, $3) returning order_id",
    )
    .bind(customer(&parts))
    .bind(&order.item)
    .bind(order.quantity)
    .fetch_one(&mut *tx)
    .await;
    match order_id {
        Ok(order_id) => (
            StatusCode::CREATED,
            [(header::LOCATION, format!("/orders/{order_id}"))],
            Json(json!({"order": order_id, "item": order.item, "quantity": order.quantity})),
        )
            .into_response(),
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

async fn stock(State(pool): State<PgPool>) -> Response {
    let stock: Result<Vec<(String, i64)>, _> =
        sqlx::query_as("select item, pieces from stock order by item")
            .fetch_all(&pool)
            .await;
    match stock {
        Ok(stock) => Json(stock).into_response(),
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// Makes the tables, unless they are there.
///
/// # Errors
/// Any database error.
pub async fn set_up(pool: &PgPool) -> Result<(), sqlx::Error> {
    let there: bool = sqlx::query_scalar("select to_regclass('orders') is not null")
        .fetch_one(pool)
        .await?;
    if !there {
        // Sent as one, they are one transaction.
        let both = format!("{} {SCHEMA}", layer::MIGRATION);
        sqlx::raw_sql(AssertSqlSafe(both)).execute(pool).await?;
    }
    Ok(())
}

/// The shop as one service.
pub fn router(pool: PgPool) -> Router {
    let idempotent = Idempotent::new(pool.clone(), Scenario::Form.default_rule(), customer);
    Router::new()
        .route("/orders", post(order))
        .layer(idempotent)
        .route("/stock", get(stock))
        .merge(error_pages())
        .with_state(pool)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL to a PostgreSQL")?;
    let pool = PgPool::connect(&url).await?;
    set_up(&pool).await?;
    tokio::spawn(purge::run_forever(pool.clone(), Duration::from_mins(1)));
    let address = std::env::var("LISTEN_ADDR").unwrap_or_else(|_| "127.0.0.1:8090".to_owned());
    let listener = tokio::net::TcpListener::bind(address.parse::<SocketAddr>()?).await?;
    eprintln!("the shop is open at http://{}", listener.local_addr()?);
    axum::serve(listener, router(pool)).await?;
    Ok(())
}
