//! The graph is changed again and again under four iothreads that write. Each
//! block says who wrote it and when; in the end all must be where it belongs.

use std::sync::Mutex;

use super::*;
use crate::runtime::Iothread;

const WRITERS: u64 = 4;
const BLOCK: u64 = 512;
const BLOCKS: u64 = 64;
const CHANGES: usize = 150;

/// One writer's blocks lie side by side; a block holds its number and the
/// generation of the write, all over.
fn block(writer: u64, index: u64, generation: u64) -> IoVec {
    let mut data = Vec::with_capacity(BLOCK as usize);
    while data.len() < BLOCK as usize {
        data.extend((writer << 32 | index).to_le_bytes());
        data.extend(generation.to_le_bytes());
    }
    let iov = bytes(BLOCK as usize, 0);
    iov.copy_from(0, &data);
    iov
}

async fn hammer(
    backend: Arc<Backend>,
    writer: u64,
    stop: Arc<AtomicBool>,
    last: Arc<Mutex<Vec<u64>>>,
) {
    let mut generation = 0;
    while !stop.load(Ordering::SeqCst) {
        generation += 1;
        for index in 0..BLOCKS {
            let offset = (writer * BLOCKS + index) * BLOCK;
            let in_flight = backend.enter().await;
            in_flight
                .write(
                    offset,
                    block(writer, index, generation),
                    WriteFlags::default(),
                )
                .await
                .expect("the storage has room");
            drop(in_flight);
            last.lock().unwrap()[index as usize] = generation;
        }
        crate::runtime::yield_now().await;
    }
}

#[test]
fn no_write_is_lost_while_the_graph_changes_under_four_iothreads() {
    let iothreads: Vec<_> = (0..WRITERS)
        .map(|i| Iothread::spawn(&format!("io{i}")).unwrap())
        .collect();
    on_main(|graph| async move {
        let (storages, nodes): (Vec<_>, Vec<_>) = ["a", "b"]
            .map(|name| disk(&graph, name))
            .into_iter()
            .unzip();
        let backend = attach(&graph, "vda", &nodes[0]);
        let stop = Arc::new(AtomicBool::new(false));
        let done: Vec<_> = iothreads
            .iter()
            .zip(0..)
            .map(|(iothread, writer)| {
                let last = Arc::new(Mutex::new(vec![0; BLOCKS as usize]));
                let (backend, stop) = (Arc::clone(&backend), Arc::clone(&stop));
                let recorded = Arc::clone(&last);
                let handle = iothread.handle().clone();
                let task = spawn_local(async move {
                    handle
                        .call(move || hammer(backend, writer, stop, recorded))
                        .await
                });
                (last, task)
            })
            .collect();

        let mut at = 0;
        for _ in 0..CHANGES {
            let filter = {
                let drained = graph.drain(&nodes[at], &[]).await.unwrap();
                // (The backend may count those that are just being held back.)
                assert_eq!(storages[at].in_flight(), 0);
                graph
                    .insert_filter(None, &nodes[at], &[], &drained, PassThrough::boxed)
                    .unwrap()
            };
            crate::runtime::yield_now().await;
            {
                let drained = graph.drain(&nodes[at], &[]).await.unwrap();
                assert_eq!(storages[at].in_flight(), 0);
                // The pivot: what the old one has goes to the new one.
                let other = 1 - at;
                storages[other].poke(0, &storages[at].snapshot());
                graph
                    .replace(&filter, &nodes[other], &[], &drained)
                    .unwrap();
                graph.remove_filter(&filter, &drained).unwrap();
                at = other;
            }
        }
        stop.store(true, Ordering::SeqCst);
        for ((last, task), writer) in done.into_iter().zip(0..) {
            task.await.expect("the iothread lives");
            let last = last.lock().unwrap();
            for (index, generation) in last.iter().enumerate() {
                let offset = (writer * BLOCKS + index as u64) * BLOCK;
                let mut wanted = vec![0; BLOCK as usize];
                block(writer, index as u64, *generation).copy_to(0, &mut wanted);
                assert!(*generation > 0);
                assert_eq!(storages[at].peek(offset, BLOCK as usize), wanted);
            }
        }
        for iothread in iothreads {
            iothread.stop();
        }
    });
}
