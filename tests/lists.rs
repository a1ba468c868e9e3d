//! Reading charges: one by its id, all of them page by page.

use serde_json::Value;
use sqlx::PgPool;

use crate::support::Service;

fn ids(list: &Value) -> Vec<String> {
    list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|charge| charge["id"].as_str().unwrap().to_owned())
        .collect()
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn charges_are_listed_newest_first_page_by_page(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut made = Vec::new();
    for i in 0..25 {
        made.push(
            service
                .charge(&format!("order_{i}"))
                .send()
                .await
                .charge_id(),
        );
    }
    made.reverse();

    let by_default = service.get("/v1/charges").send().await.value();
    assert_eq!(ids(&by_default), made[..10]);
    assert_eq!(by_default["object"], "list");
    assert_eq!(by_default["url"], "/v1/charges");
    assert_eq!(by_default["has_more"], true);

    let mut paged = Vec::new();
    let mut path = "/v1/charges?limit=7".to_owned();
    loop {
        let page = service.get(&path).send().await.value();
        let new = ids(&page);
        assert!(new.len() <= 7);
        path = format!("/v1/charges?limit=7&starting_after={}", new.last().unwrap());
        paged.extend(new);
        // A charge made meanwhile does not shift the pages.
        service
            .charge(&format!("between_{}", paged.len()))
            .send()
            .await;
        if page["has_more"] == false {
            break;
        }
    }
    assert_eq!(paged, made);

    let exactly = service.get("/v1/charges?limit=29").send().await.value();
    assert_eq!(
        (ids(&exactly).len(), &exactly["has_more"]),
        (29, &Value::Bool(false))
    );
    let all_but_one = service.get("/v1/charges?limit=28").send().await.value();
    assert_eq!(all_but_one["has_more"], true);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_listed_charge_is_the_charge(pool: PgPool) {
    let service = Service::start(&pool).await;
    let made = service
        .post("/v1/charges", "order_1")
        .form("amount=700&currency=jpy&source=tok_visa&capture=false&metadata[order]=7&description=two+words")
        .send()
        .await;
    let charge = made.value();
    assert_eq!(charge["captured"], false);
    assert_eq!(charge["amount_captured"], 0);
    assert_eq!(charge["paid"], true);
    assert_eq!(
        service.get("/v1/charges").send().await.value()["data"][0],
        charge
    );
    assert_eq!(
        service
            .get(&format!("/v1/charges/{}", made.charge_id()))
            .send()
            .await
            .value(),
        charge
    );
}
