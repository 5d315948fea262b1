// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel that Rust needs as symbols. Where several belong
 * together they are one helper, so that a packet or a page costs one call. Contracts are those of
 * the functions called unless a comment says more.
 */
#include "bindings.h"

#include <linux/anon_inodes.h>
#include <linux/highmem.h>
#include <linux/if_arp.h>
#include <linux/pagemap.h>
#include <linux/user_namespace.h>
#include <net/netlink.h>
#include <net/rtnetlink.h>

/* The kernel has no prototypes for what only Rust calls; bindings.h has. */

/*
 * Make a packet independent of its sender, so that it can be held for any time: no buffer of user space backs it
 * any more, which the sender could change after the fact. False if there is no memory for that.
 */
bool remus_skb_detach(struct sk_buff *skb)
{
	return !skb_orphan_frags_rx(skb, GFP_ATOMIC);
}

void remus_skb_free(struct sk_buff *skb)
{
	kfree_skb_reason(skb, SKB_DROP_REASON_QDISC_DROP);
}

/*
 * Let the stack receive a chain of packets that an ingress hook took, in order, as if they had just
 * passed that hook: tc_skip_classify makes it skip the taps, tc's ingress and the hook, as ifb does.
 * Process context; softirqs that this raises have run, as far as they will here, on return.
 */
void remus_skb_receive(struct sk_buff *first)
{
	LIST_HEAD(list);

	while (first) {
		struct sk_buff *skb = first;

		first = skb->next;
		skb_mark_not_on_list(skb);
		skb->tc_skip_classify = 1;
		/*
		 * Generic XDP has seen it, too. What keeps it from running again is kept from it on
		 * devices further on as well, so not without need.
		 */
		if (rcu_access_pointer(skb->dev->xdp_prog))
			skb_set_redirected_noclear(skb, false);
		list_add_tail(&skb->list, &list);
	}
	local_bh_disable();
	netif_receive_skb_list(&list);
	local_bh_enable();
}

struct net_device *remus_qdisc_dev(const struct Qdisc *sch)
{
	return qdisc_dev(sch);
}

struct sk_buff *remus_qdisc_peek(struct Qdisc *sch)
{
	return qdisc_peek_dequeued(sch);
}

/* What passes at once, towards the guest: a first-in first-out queue as long as the device's. */
int remus_qdisc_fifo_enqueue(struct sk_buff *skb, struct Qdisc *sch, struct sk_buff **to_free)
{
	unsigned int limit = READ_ONCE(qdisc_dev(sch)->tx_queue_len) ?: DEFAULT_TX_QUEUE_LEN;

	if (likely(sch->q.qlen < limit))
		return qdisc_enqueue_tail(skb, sch);
	return qdisc_drop(skb, sch, to_free);
}

struct sk_buff *remus_qdisc_fifo_dequeue(struct Qdisc *sch)
{
	return qdisc_dequeue_head(sch);
}

void remus_qdisc_fifo_purge(struct Qdisc *sch)
{
	__qdisc_reset_queue(&sch->q);
}

/* Account for a packet that was held and is dropped. */
void remus_qdisc_forgotten(struct Qdisc *sch, const struct sk_buff *skb)
{
	sch->q.qlen--;
	qdisc_qstats_backlog_dec(sch, skb);
	qdisc_qstats_drop(sch);
}

void remus_qdisc_lock(struct Qdisc *sch)
{
	spin_lock_bh(qdisc_lock(sch));
}

void remus_qdisc_unlock(struct Qdisc *sch)
{
	spin_unlock_bh(qdisc_lock(sch));
}

/* The same where softirqs are off already. */
void remus_qdisc_lock_softirq(struct Qdisc *sch)
{
	spin_lock(qdisc_lock(sch));
}

void remus_qdisc_unlock_softirq(struct Qdisc *sch)
{
	spin_unlock(qdisc_lock(sch));
}

/* Whether the scheduler is about to destroy it: it resets it first, without the root lock. */
bool remus_qdisc_is_dying(const struct Qdisc *sch)
{
	return !refcount_read(&sch->refcnt);
}

/*
 * Have the device dequeue: here, as far as softirqs go before they leave the rest to ksoftirqd. Process
 * context.
 */
void remus_qdisc_wake(struct Qdisc *sch)
{
	local_bh_disable();
	__netif_schedule(sch);
	local_bh_enable();
}

/*
 * Wait until no softirq has the qdisc any more that remus_qdisc_wake() scheduled, and that nobody
 * schedules again. net_tx_action() takes the root lock before it clears the bit. May sleep.
 */
void remus_qdisc_settle(struct Qdisc *sch)
{
	while (test_bit(__QDISC_STATE_SCHED, &sch->state))
		schedule_timeout_uninterruptible(1);
	spin_lock_bh(qdisc_lock(sch));
	spin_unlock_bh(qdisc_lock(sch));
}

int remus_qdisc_drop(struct sk_buff *skb, struct Qdisc *sch, struct sk_buff **to_free)
{
	return qdisc_drop(skb, sch, to_free);
}

const char *remus_dev_name(const struct net_device *dev)
{
	return dev->name;
}

struct net *remus_dev_net(const struct net_device *dev)
{
	return dev_net(dev);
}

/* Whether a virtual machine is behind the device: a tap, or the back end of a Xen interface. */
bool remus_dev_is_guest(const struct net_device *dev)
{
	const struct device *parent = dev->dev.parent;

	if (dev->rtnl_link_ops && !strcmp(dev->rtnl_link_ops->kind, "tun"))
		return dev->type == ARPHRD_ETHER;
	return parent && parent->bus && !strcmp(parent->bus->name, "xen-backend");
}

/* Without the RTNL: while the device is being renamed, part of the name may be the old one's. */
void remus_dev_copy_name(const struct net_device *dev, char *name)
{
	strscpy(name, dev->name, IFNAMSIZ);
}

int remus_dev_ifindex(const struct net_device *dev)
{
	return dev->ifindex;
}

/* Not per CPU, and not of high priority: who commits goes on at once, and another CPU delivers. */
struct workqueue_struct *remus_workqueue_new(void)
{
	return alloc_workqueue("remus", WQ_UNBOUND, 0);
}

/* An answer to portid and seq, or an event, for which both are 0. */
struct sk_buff *remus_genl_new(const struct genl_family *family, u32 portid, u32 seq, u8 cmd, void **header)
{
	struct sk_buff *msg = genlmsg_new(GENLMSG_DEFAULT_SIZE, GFP_KERNEL);

	if (!msg)
		return NULL;
	*header = genlmsg_put(msg, portid, seq, family, 0, cmd);
	if (!*header) {
		nlmsg_free(msg);
		return NULL;
	}
	return msg;
}

/* Consumes msg. */
int remus_genl_reply(struct sk_buff *msg, void *header, struct genl_info *info)
{
	genlmsg_end(msg, header);
	return genlmsg_reply(msg, info);
}

/*
 * Send an event to the listeners in all network namespaces of the host's administrator: a container
 * that has a user namespace of its own is not told about the host's domains. Consumes msg.
 */
void remus_genl_event_send(const struct genl_family *family, struct sk_buff *msg, void *header, unsigned int group)
{
	struct net *net;

	genlmsg_end(msg, header);
	rcu_read_lock();
	for_each_net_rcu(net) {
		struct sk_buff *copy;

		if (net->user_ns != &init_user_ns || genl_has_listeners(family, net, group) <= 0)
			continue;
		copy = skb_clone(msg, GFP_ATOMIC);
		if (copy)
			genlmsg_multicast_netns(family, net, copy, 0, group, GFP_ATOMIC);
	}
	rcu_read_unlock();
	nlmsg_free(msg);
}

const struct genl_info *remus_genl_dump_info(struct netlink_callback *cb)
{
	return genl_info_dump(cb);
}

struct net *remus_genl_net(const struct genl_info *info)
{
	return genl_info_net(info);
}

void *remus_genl_dump_begin(struct sk_buff *msg, struct netlink_callback *cb)
{
	const struct genl_info *info = genl_info_dump(cb);

	return genlmsg_put(msg, info->snd_portid, info->snd_seq, info->family, NLM_F_MULTI,
			   info->genlhdr->cmd);
}

void remus_genl_dump_end(struct sk_buff *msg, void *header)
{
	genlmsg_end(msg, header);
}

void remus_genl_dump_cancel(struct sk_buff *msg, void *header)
{
	genlmsg_cancel(msg, header);
}

void remus_nlmsg_free(struct sk_buff *msg)
{
	nlmsg_free(msg);
}

struct nlattr *remus_nla_nest_start(struct sk_buff *skb, int type)
{
	return nla_nest_start_noflag(skb, type);
}

void remus_nla_nest_end(struct sk_buff *skb, struct nlattr *start)
{
	nla_nest_end(skb, start);
}

int remus_nla_parse_nested(struct nlattr **tb, int max, const struct nlattr *nla,
			   const struct nla_policy *policy, struct netlink_ext_ack *extack)
{
	/* tc does not set NLA_F_NESTED on TCA_OPTIONS; apart from that, be strict. */
	return __nla_parse(tb, max, nla_data(nla), nla_len(nla), policy,
			   NL_VALIDATE_STRICT & ~NL_VALIDATE_NESTED, extack);
}

/* 1 << order pages, each with a reference of its own. */
struct page *remus_page_alloc(unsigned int order)
{
	gfp_t gfp = GFP_HIGHUSER | __GFP_ACCOUNT;
	struct page *page;

	if (!order)
		return alloc_page(gfp);
	page = alloc_pages(gfp | __GFP_NORETRY | __GFP_NOWARN, order);
	if (page)
		split_page(page, order);
	return page;
}

struct page *remus_page_alloc_low(void)
{
	return alloc_page(GFP_KERNEL_ACCOUNT);
}

void *remus_page_address(const struct page *page)
{
	return page_address(page);
}

void remus_page_get(struct page *page)
{
	get_page(page);
}

void remus_page_put(struct page *page)
{
	put_page(page);
}

void remus_page_lock(struct page *page)
{
	lock_page(page);
}

void remus_page_unlock(struct page *page)
{
	unlock_page(page);
}

void remus_pages_wait_unlocked(struct page *first, unsigned long count)
{
	for (struct page *page = first; page < first + count; page++)
		folio_wait_locked(page_folio(page));
}

void remus_page_clear(struct page *page)
{
	clear_highpage(page);
}

/*
 * With the page locked nobody adds a mapping, so the number of mappings, which is read last, can only be
 * too low; each comes with a reference, and its owner has another one.
 */
static bool page_maybe_held(struct page *page)
{
	struct folio *folio = page_folio(page);
	bool held;
	int refs;

	folio_lock(folio);
	refs = folio_ref_count(folio);
	smp_rmb();
	held = refs > 1 + folio_mapcount(folio);
	folio_unlock(folio);
	return held;
}

unsigned long remus_pages_next_held(struct page *first, unsigned long from, unsigned long count)
{
	while (from < count && !page_maybe_held(first + from))
		from++;
	return from;
}

int remus_page_read_to_user(struct page *page, void __user *to)
{
	void *from = kmap_local_page(page);
	unsigned long left = copy_to_user(to, from, PAGE_SIZE);

	kunmap_local(from);
	return left ? -EFAULT : 0;
}

unsigned long remus_page_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

void remus_page_copy(struct page *to, struct page *from)
{
	copy_highpage(to, from);
}

bool remus_page_equal(struct page *one, struct page *other)
{
	const void *a = kmap_local_page(one);
	const void *b = kmap_local_page(other);
	bool equal = !memcmp(a, b, PAGE_SIZE);

	kunmap_local(b);
	kunmap_local(a);
	return equal;
}

void remus_page_read(struct page *page, size_t offset, void *to, size_t len)
{
	memcpy_from_page(to, page, offset, len);
}

void remus_page_write(struct page *page, size_t offset, const void *from, size_t len)
{
	memcpy_to_page(page, offset, from, len);
}

void remus_array_init(struct xarray *xa)
{
	xa_init_flags(xa, XA_FLAGS_ACCOUNT);
}

void *remus_array_next(struct xarray *xa, unsigned long *index)
{
	return xa_find(xa, index, ULONG_MAX, XA_PRESENT);
}

int remus_array_insert(struct xarray *xa, unsigned long index, void *entry)
{
	return xa_insert(xa, index, entry, GFP_KERNEL);
}

bool remus_signal_pending(void)
{
	return signal_pending(current);
}

void remus_cond_resched(void)
{
	cond_resched();
}

struct mem_cgroup *remus_memcg_current(void)
{
	return get_mem_cgroup_from_mm(current->mm);
}

void remus_memcg_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

struct mem_cgroup *remus_memcg_charge(struct mem_cgroup *memcg)
{
	return set_active_memcg(memcg);
}

/*
 * Whether a mapping was asked for as shared. (A shared one of a file that was opened for reading alone
 * is VM_MAYSHARE, not VM_SHARED; and kernel::mm::virt::flags::MAYSHARE is VM_MAYEXEC in Linux 7.2.)
 */
bool remus_vma_is_shared(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_MAYSHARE;
}

/*
 * A new anonymous inode, for an address space that nothing else shares. The file that comes with it
 * is let go at once; its operations are empty and need no module.
 */
struct inode *remus_inode_new(const char *name)
{
	static const struct file_operations none = {};
	struct file *file = anon_inode_create_getfile(name, &none, NULL, O_RDWR, NULL);
	struct inode *inode;

	if (IS_ERR(file))
		return ERR_CAST(file);
	inode = file_inode(file);
	ihold(inode);
	fput(file);
	return inode;
}

struct address_space *remus_inode_mapping(const struct inode *inode)
{
	return inode->i_mapping;
}

void remus_file_set_mapping(struct file *file, struct inode *inode)
{
	file->f_mapping = inode->i_mapping;
}
