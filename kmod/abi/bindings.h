/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads: the kernel headers that `kernel::bindings` leaves out, and our own helpers.
 * The allowlist is in the top-level Kbuild.
 */
#ifndef REMUS_BINDINGS_H
#define REMUS_BINDINGS_H

#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/memcontrol.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/netdevice.h>
#include <linux/netfilter.h>
#include <linux/netlink.h>
#include <linux/rmap.h>
#include <linux/rwsem.h>
#include <linux/skbuff.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include <net/gen_stats.h>
#include <net/genetlink.h>
#include <net/pkt_sched.h>
#include <net/sch_generic.h>

/* Macros that bindgen cannot evaluate. */
static const u8 REMUS_MCAST_CAP_NET_ADMIN = GENL_MCAST_CAP_NET_ADMIN;

bool remus_skb_detach(struct sk_buff *skb);
void remus_skb_free(struct sk_buff *skb);
void remus_skb_receive(struct sk_buff *first);

struct net_device *remus_qdisc_dev(const struct Qdisc *sch);
struct sk_buff *remus_qdisc_peek(struct Qdisc *sch);
int remus_qdisc_fifo_enqueue(struct sk_buff *skb, struct Qdisc *sch, struct sk_buff **to_free);
struct sk_buff *remus_qdisc_fifo_dequeue(struct Qdisc *sch);
void remus_qdisc_fifo_purge(struct Qdisc *sch);
void remus_qdisc_forgotten(struct Qdisc *sch, const struct sk_buff *skb);
void remus_qdisc_lock(struct Qdisc *sch);
void remus_qdisc_unlock(struct Qdisc *sch);
void remus_qdisc_lock_softirq(struct Qdisc *sch);
void remus_qdisc_unlock_softirq(struct Qdisc *sch);
bool remus_qdisc_is_dying(const struct Qdisc *sch);
void remus_qdisc_wake(struct Qdisc *sch);
void remus_qdisc_settle(struct Qdisc *sch);
int remus_qdisc_drop(struct sk_buff *skb, struct Qdisc *sch, struct sk_buff **to_free);

const char *remus_dev_name(const struct net_device *dev);
struct net *remus_dev_net(const struct net_device *dev);
bool remus_dev_is_guest(const struct net_device *dev);
void remus_dev_copy_name(const struct net_device *dev, char *name);
int remus_dev_ifindex(const struct net_device *dev);

struct workqueue_struct *remus_workqueue_new(void);

struct sk_buff *remus_genl_new(const struct genl_family *family, u32 portid, u32 seq, u8 cmd, void **header);
int remus_genl_reply(struct sk_buff *msg, void *header, struct genl_info *info);
void remus_genl_event_send(const struct genl_family *family, struct sk_buff *msg, void *header, unsigned int group);
const struct genl_info *remus_genl_dump_info(struct netlink_callback *cb);
struct net *remus_genl_net(const struct genl_info *info);
void *remus_genl_dump_begin(struct sk_buff *msg, struct netlink_callback *cb);
void remus_genl_dump_end(struct sk_buff *msg, void *header);
void remus_genl_dump_cancel(struct sk_buff *msg, void *header);
void remus_nlmsg_free(struct sk_buff *msg);
struct nlattr *remus_nla_nest_start(struct sk_buff *skb, int type);
void remus_nla_nest_end(struct sk_buff *skb, struct nlattr *start);
int remus_nla_parse_nested(struct nlattr **tb, int max, const struct nlattr *nla,
			   const struct nla_policy *policy, struct netlink_ext_ack *extack);

struct page *remus_page_alloc(unsigned int order);
struct page *remus_page_alloc_low(void);
void *remus_page_address(const struct page *page);
void remus_page_get(struct page *page);
void remus_page_put(struct page *page);
void remus_page_lock(struct page *page);
void remus_page_unlock(struct page *page);
void remus_pages_wait_unlocked(struct page *first, unsigned long count);
void remus_page_clear(struct page *page);
unsigned long remus_pages_next_held(struct page *first, unsigned long from, unsigned long count);
int remus_page_read_to_user(struct page *page, void *to);
unsigned long remus_page_pfn(const struct page *page);
void remus_page_copy(struct page *to, struct page *from);
bool remus_page_equal(struct page *one, struct page *other);
void remus_page_read(struct page *page, size_t offset, void *to, size_t len);
void remus_page_write(struct page *page, size_t offset, const void *from, size_t len);

void remus_array_init(struct xarray *xa);
void *remus_array_next(struct xarray *xa, unsigned long *index);
int remus_array_insert(struct xarray *xa, unsigned long index, void *entry);
void remus_cond_resched(void);
bool remus_signal_pending(void);

struct mem_cgroup *remus_memcg_current(void);
void remus_memcg_put(struct mem_cgroup *memcg);
struct mem_cgroup *remus_memcg_charge(struct mem_cgroup *memcg);

bool remus_vma_is_shared(const struct vm_area_struct *vma);
struct inode *remus_inode_new(const char *name);
struct address_space *remus_inode_mapping(const struct inode *inode);
void remus_file_set_mapping(struct file *file, struct inode *inode);

#endif
